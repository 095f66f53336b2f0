"""The matrix G that engines write to, and the random numbers that a pass may use up."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

# Rows of G start on cache lines, which makes the Gramian's loads aligned.
_ALIGNMENT_BYTES = 64


def new_rows(t: int, parameters: Sequence[Parameter]) -> Tensor:
    """An uninitialised matrix G (t, p) for these parameters; its rows are slices of a slightly wider buffer."""
    like, p = parameters[0], sum(parameter.numel() for parameter in parameters)
    per_line = _ALIGNMENT_BYTES // like.element_size()
    return torch.empty((t, -(-p // per_line) * per_line), dtype=like.dtype, device=like.device)[:, :p]


def random_devices(parameters: Sequence[Parameter]) -> list[int]:
    """The GPUs whose random numbers the pass may use up; none while a graph is captured, which brings its own."""
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    return [] if devices and torch.cuda.is_current_stream_capturing() else devices
