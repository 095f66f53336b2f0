"""What a comparison changes in the model and then puts back, bit by bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def buffers_restored(buffers: Sequence[Tensor], *, only_on_failure: bool = False) -> Iterator[None]:
    """Puts buffers, running statistics say, back as they were before the block, or before a block that failed."""
    before = [buffer.clone() for buffer in buffers]
    has_failed = True
    try:
        yield
        has_failed = False
    finally:
        if has_failed or not only_on_failure:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)


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
