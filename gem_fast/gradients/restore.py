"""What comparisons and passes change in the model and then put back, bit by bit."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Buffers:
    """The buffers of some modules as they are now, running statistics say."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [
            (module, name, buffer, None if buffer is None else buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
        ]

    def are_unchanged(self) -> bool:
        """Whether the modules still have these values."""
        now = [(module._buffers.get(name), value) for module, name, _, value in self._kept]
        return all(
            mine is value or (mine is not None and value is not None and mine.equal(value)) for mine, value in now
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the modules back the same tensors, with these values."""
        for module, name, buffer, value in self._kept:
            module._buffers[name] = buffer
            if buffer is not None and value is not None:
                buffer.copy_(value)


@contextmanager
def buffers_restored(modules: Iterable[nn.Module], *, only_on_failure: bool = False) -> Iterator[Buffers]:
    """Puts the modules' buffers back as they were before the block, or before a block that failed; gives these."""
    before = Buffers(modules)
    has_failed = True
    try:
        yield before
        has_failed = False
    finally:
        if has_failed or not only_on_failure:
            before.restore()


@contextmanager
def in_float64(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within the block these have their values in float64; then they have their own dtype, memory and values again."""
    floating = [x for x in tensors if x.is_floating_point()]
    before = [x.data for x in floating]
    try:
        for x in floating:
            x.data = x.data.double()
        yield
    finally:
        for x, data in zip(floating, before, strict=True):
            x.data = data


@contextmanager
def parameters_moved(parameters: Sequence[Tensor], seed: int) -> Iterator[None]:
    """Each number within the block is another one by about the root of its rounding: 0.03 % in float32.

    The noise comes from a generator of its own. The parameters' version counters stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = [parameter.data for parameter in parameters if parameter.is_floating_point()]
    before = [data.clone() for data in moved]
    try:
        for data in moved:
            noise = torch.randn(data.shape, generator=generator)
            data.mul_((1 + torch.finfo(data.dtype).eps ** 0.5 * noise).to(data))
        yield
    finally:
        for data, value in zip(moved, before, strict=True):
            data.copy_(value)


@contextmanager
def parameters_replaced(values: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Within the block, these modules have these tensors in place of their parameters of these names."""
    before = [(owner, name, owner._parameters[name]) for owner, name, _ in values]
    try:
        for owner, name, value in values:
            owner._parameters[name] = value  # type: ignore[assignment]
        yield
    finally:
        for owner, name, parameter in before:
            owner._parameters[name] = parameter


@contextmanager
def grads_set_aside(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Within the block, `.grad` of these leaves begins as None; then it is what it was before."""
    before = [(leaf, leaf.grad) for leaf in leaves]
    try:
        for leaf, _ in before:
            leaf.grad = None
        yield
    finally:
        for leaf, grad in before:
            leaf.grad = grad
