"""Compares a fused pass with one backward per task before anything relies on it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from gem_fast.task_gradients.recording import CannotFuse
from gem_fast.task_gradients.rows import new_rows, random_devices


def verify(
    model: nn.Module,
    parameters: Sequence[Parameter],
    t: int,
    fused: Callable[[Tensor], None],
    loop: Callable[[Tensor], None],
) -> None:
    """Raises CannotFuse unless both write the same rows, to rounding; leaves no trace in the model.

    Args:
        model: whose buffers are put back as they were.
        parameters: in the order in which they make up a row.
        t: the number of rows.
        fused: writes rows (t, p).
        loop: writes the same rows; what it raises is the model's or the loss's own.
    """
    expected, got = new_rows(t, parameters), new_rows(t, parameters)
    with torch.random.fork_rng(random_devices(parameters)), _NothingDropped():
        with _restored(model):
            loop(expected)
        with _restored(model):
            try:
                fused(got)
            except CannotFuse:
                raise
            except Exception as error:  # whatever a model does that no rule foresaw: the loop has just handled it
                raise CannotFuse(f"the fused pass failed: {type(error).__name__}: {error}") from error
    _compare(model, parameters, expected, got)


def _compare(model: nn.Module, parameters: Sequence[Parameter], expected: Tensor, got: Tensor) -> None:
    # Rounding flips a ReLU now and then; what is wrong in principle is wrong by orders of magnitude more.
    tolerance = 3 * torch.finfo(expected.dtype).eps ** 0.5
    floor = 0.01 * expected.double().norm(dim=1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, right, mine in zip(parameters, expected.split(sizes, 1), got.split(sizes, 1), strict=True):
        error = (mine.double() - right.double()).norm(dim=1)
        # Not "greater than": a NaN must not pass.
        if not bool((error <= tolerance * torch.maximum(right.double().norm(dim=1), floor)).all()):
            raise CannotFuse(
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
