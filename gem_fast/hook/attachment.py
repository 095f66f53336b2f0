"""A hook's place on its optimizer: from when to when it sees the optimizer's steps."""

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

# The optimizers that a hook is attached to; an entry goes when its optimizer does.
_hooked: weakref.WeakSet[Optimizer] = weakref.WeakSet()


Hook = TypeVar("Hook", bound="Attached")


class Attached:
    """What a hook is, beside what it does: on an optimizer until it is detached, and never in two places."""

    _attachment: "Attachment"

    @property
    def attached(self) -> bool:
        """Whether the optimizer's steps are projected: from construction to `detach`."""
        return self._attachment.optimizer is not None

    def detach(self) -> None:
        """Takes the hook off the optimizer, whose steps are plain ones from then on; a second call does nothing.

        The optimizer can then have another hook. Leaving a `with` block over the hook detaches it, too.
        """
        self._attachment.detach()

    def __enter__(self: Hook) -> Hook:
        if not self.attached:
            raise RuntimeError(
                "the hook must be attached to be used in a with block, got a detached one; make a new one"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __reduce__(self) -> NoReturn:
        # Both copy.deepcopy and pickle come here.
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: the copy would be attached to no optimizer; make a "
            "new one on the copied optimizer and give it this one's state_dict()"
        )


class Attachment:
    """Calls before and after each step of an optimizer, until `detach`.

    The optimizer owns the hook; a strong reference back would keep both, and the model, until a collection.

    Args:
        optimizer: of which `check_is_free` holds.
        given: the same, or a wrapper around it.
        before: called as torch calls a step pre-hook.
        after: called as torch calls a step post-hook.
    """

    def __init__(
        self, optimizer: Optimizer, given: Any, before: Callable[..., Any], after: Callable[..., None]
    ) -> None:
        self._reference = weakref.ref(optimizer)
        self._given = weakref.ref(given)
        self._is_detached = False
        self._handles = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
        _hooked.add(optimizer)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer whose steps are seen; None where there is none any more."""
        return None if self._is_detached else self._reference()

    @property
    def is_first(self) -> bool:
        """Whether nobody is to see the gradients of a step before the hook does."""
        optimizer = self.optimizer
        given: Any = self._given()
        if optimizer is None or given is not optimizer or _global_optimizer_pre_hooks:
            return False
        step = vars(optimizer).get("step")  # which schedulers put there, and others
        is_own = step is None or hasattr(step, "_wrapped_by_lr_sched")
        return is_own and bool(next(iter(optimizer._optimizer_step_pre_hooks)) == self._handles[0].id)

    def to_step(self) -> Any:
        """The optimizer as the user has it.

        Raises:
            RuntimeError: there is none any more, or it scales losses by itself.
        """
        optimizer = self.optimizer
        if optimizer is None:
            got = "a detached one; make a new one"
            if not self._is_detached:
                got = "one whose optimizer is gone; keep the optimizer in a variable"
            raise RuntimeError(f"step must be called on a hook that is attached, got {got}")
        given = self._given()
        if given is None:
            return optimizer
        if given is not optimizer and getattr(given, "scaler", None) is not None:
            raise RuntimeError(
                f"step must get losses that only it scales, got {type(given).__name__} with a scaler of its own; write "
                "the step out, with observe before the optimizer's step"
            )
        return given

    def detach(self) -> None:
        """Takes both calls off the optimizer, which can then have another hook; a second time it does nothing."""
        optimizer = self.optimizer
        if optimizer is not None:
            for handle in self._handles:
                handle.remove()
            _hooked.discard(optimizer)
        self._is_detached = True


def check_is_free(optimizer: Optimizer) -> None:
    """Raises RuntimeError where the optimizer has a hook."""
    if optimizer in _hooked:
        raise RuntimeError(
            "optimizer must have no hook of gem_fast yet, got one that has: it would be projected twice; call "
            "detach() on the first hook"
        )
