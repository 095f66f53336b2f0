"""Compares a fused pass with one backward per task before anything relies on it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from gem_fast.task_gradients.recording import CannotFuse, CannotVerify, Recorder
from gem_fast.task_gradients.rows import new_rows, random_devices


class RowsDiffer(CannotFuse):
    """The gradients are others: by a mistake in principle, or because a ReLU's input was zero but for rounding."""


def verify(
    model: nn.Module,
    parameters: Sequence[Parameter],
    t: int,
    fused: Callable[[Tensor], list[bool]],
    loop: Callable[[Tensor], list[bool]],
) -> None:
    """Raises CannotFuse unless both do the same, to rounding; leaves no trace in the model.

    Args:
        model: whose buffers are put back as they were.
        parameters: in the order in which they make up a row.
        t: the number of rows.
        fused: writes rows (t, p) and returns, per parameter, whether a row depends on it.
        loop: the same; what it raises is the model's or the loss's own.

    Raises:
        CannotVerify: the gradients are not finite.
        RowsDiffer: the rows do.
        CannotFuse: dependences or the model's buffers differ, or the fused pass failed.
    """
    expected, got = new_rows(t, parameters), new_rows(t, parameters)
    with torch.random.fork_rng(random_devices(parameters)), _NothingDropped():
        with _restored(model):
            reached = loop(expected)
            buffers = [buffer.clone() for buffer in model.buffers()]
        with _restored(model), failures_as_reasons():
            same = fused(got) == reached
            _compare_buffers(model, buffers)
    if not bool(expected.isfinite().all()):
        raise CannotVerify("the gradients are not finite")
    _compare(model, parameters, expected, got)
    if not same:
        raise CannotFuse("a parameter that is used outside of its layer would be missed")


@contextmanager
def failures_as_reasons() -> Iterator[None]:
    """Turns whatever a model does that no rule foresaw into a reason to leave it to the loop."""
    try:
        yield
    except CannotFuse:
        raise
    except Exception as error:
        raise CannotFuse(f"the fused pass failed: {type(error).__name__}: {error}") from error


def check_every_use_is_known(recorder: Recorder, grads: Sequence[Tensor | None], ends: Sequence[Tensor]) -> None:
    """Raises CannotFuse where outputs or losses depend on a parameter in more places than rules have noted.

    Such a place may add nothing to the gradients that are compared, and something later: behind weights that start from
    zero, say.
    """
    noted = Counter(use.parameter for use in recorder.uses if use.dim is not None and grads[use.edge] is not None)
    found: Counter[Tensor] = Counter()
    seen, waiting = set(), [end.grad_fn for end in ends]
    while waiting:
        node = waiting.pop()
        for after, _ in node.next_functions if node is not None else ():
            variable = getattr(after, "variable", None)
            if variable is not None:
                found[variable] += 1
            elif after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    for parameter, times in found.items():
        if isinstance(parameter, Parameter) and recorder.wants(parameter) and times > noted[parameter]:
            raise CannotFuse(f"a parameter of shape {tuple(parameter.shape)} is used outside of its layer")


def _compare_buffers(model: nn.Module, expected: Sequence[Tensor]) -> None:
    for (name, got), right in zip(model.named_buffers(), expected, strict=True):
        # Whatever is not finite must be so in both.
        if not torch.allclose(got.double(), right.double(), rtol=1e-3, atol=1e-6, equal_nan=True):
            raise CannotFuse(f"the buffer {name} is not left as by one pass per task")


def _compare(model: nn.Module, parameters: Sequence[Parameter], expected: Tensor, got: Tensor) -> None:
    # Rounding flips a ReLU now and then: of many, it changes less than this; of few, the caller tries again.
    tolerance = 3 * torch.finfo(expected.dtype).eps ** 0.5
    floor = 0.01 * expected.double().norm(dim=1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, right, mine in zip(parameters, expected.split(sizes, 1), got.split(sizes, 1), strict=True):
        error = (mine.double() - right.double()).norm(dim=1)
        # Not "greater than": a NaN must not pass.
        if not bool((error <= tolerance * torch.maximum(right.double().norm(dim=1), floor)).all()):
            raise RowsDiffer(
                f"the gradients of {names.get(parameter, 'a parameter')} differ from those of one backward per task: "
                "the model mixes the examples of a mini-batch, or uses a parameter in a way that no rule knows"
            )


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Puts the model's buffers, running statistics say, back as they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


class _NothingDropped(TorchDispatchMode):
    """Dropout keeps everything, so that two passes can be compared."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and importing the compiler to say so takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].fill_(1)
        if func is torch.ops.aten.native_dropout.default:
            x, probability, train = args
            return x / (1 - probability if train else 1), torch.ones_like(x, dtype=torch.bool)
        return func(*args, **(kwargs or {}))


class KeptBytes:
    """Counts what autograd keeps for the backward of what runs within the block.

    Attributes:
        total: bytes, parameters left out.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.total = 0
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda x: x)

    def __enter__(self) -> "KeptBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _count(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return x
