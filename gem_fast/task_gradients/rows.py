"""The matrix G that engines write to, and the random numbers that a pass may use up."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# Rows of G start on cache lines, which makes the Gramian's loads aligned.
_ALIGNMENT_BYTES = 64


def new_rows(t: int, parameters: Sequence[Tensor]) -> Tensor:
    """An uninitialised matrix G (t, p) for these parameters; its rows are slices of a slightly wider buffer."""
    like, p = parameters[0], sum(parameter.numel() for parameter in parameters)
    per_line = _ALIGNMENT_BYTES // like.element_size()
    return torch.empty((t, -(-p // per_line) * per_line), dtype=like.dtype, device=like.device)[:, :p]


def enough_rows(G: Tensor | None, t: int, parameters: Sequence[Tensor]) -> Tensor:
    """G itself where it has t rows or more for these parameters, else a new matrix."""
    like, p = parameters[0], sum(parameter.numel() for parameter in parameters)
    if G is not None and len(G) >= t and (G.shape[1], G.dtype, G.device) == (p, like.dtype, like.device):
        return G
    return new_rows(t, parameters)


class Blocks:
    """Which part of G belongs to which parameter; cut anew only for another G or other parameters."""

    def __init__(self) -> None:
        self._blocks: dict[Tensor, Tensor] = {}
        self._of: tuple[Any, ...] = ()

    def __call__(self, G: Tensor, parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """For each parameter the part (t, ...) of G (t, p) that is its own."""
        of = (G.data_ptr(), G.dtype, G.shape, G.stride(), *map(id, parameters))
        if of != self._of:
            parts = G.split([parameter.numel() for parameter in parameters], 1)
            self._blocks = {
                parameter: part.unflatten(1, parameter.shape or (1,))
                for parameter, part in zip(parameters, parts, strict=True)
            }
            self._of = of
        return self._blocks


def random_devices(parameters: Sequence[Parameter]) -> list[int]:
    """The GPUs whose random numbers the pass may use up; none while a graph is captured, which brings its own."""
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    return [] if devices and torch.cuda.is_current_stream_capturing() else devices
