"""A hook's place on its optimizer: from when to when it sees the optimizer's steps."""

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

# The optimizers that a hook is attached to; an entry goes when its optimizer does.
_hooked: weakref.WeakSet[Optimizer] = weakref.WeakSet()


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

    def to_step(self) -> Any:
        """The optimizer as the user has it.

        Raises:
            RuntimeError: there is none any more, or it scales losses by itself.
        """
        optimizer = self.optimizer
        if optimizer is None:
            raise RuntimeError("step must be called on a hook that is attached, got a detached one; make a new one")
        given = self._given() or optimizer
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
