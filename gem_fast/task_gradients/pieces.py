"""Mini-batches made of several tasks' examples."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from gem_fast.task_gradients.sparse import SparseEntries


class Segments:
    """Tasks' examples, one task after the other along the first dimension of a mini-batch.

    Attributes:
        sizes: the number of examples of each task.
        total: N, their sum.
        equal: the number of examples where all tasks have the same, else None.
    """

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.total = sum(sizes)
        self.equal = sizes[0] if len(set(sizes)) == 1 else None

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, ...) as one view (n_k, ...) per task."""
        parts: tuple[Tensor, ...] = x.split(self.sizes)
        return parts

    def stacked(self, x: Tensor) -> Tensor:
        """(N, ...) as (t, n, ...), for tasks of the same size."""
        assert self.equal is not None
        return x.reshape(len(self.sizes), self.equal, *x.shape[1:])

    def sum(self, x: Tensor, out: Tensor) -> None:
        """out[k] = the sum over task k's examples of x (N, ...); out is (t, ...)."""
        if self.equal is not None:
            torch.sum(self.stacked(x), 1, out=out)
            return
        for mine, row in zip(self.split(x), out, strict=True):
            torch.sum(mine, 0, out=row)


class Piece(NamedTuple):
    """What goes through the model in one forward."""

    x: Tensor
    """(N, ...): inputs, one task after the other."""
    y: Tensor
    """(N, ...): targets."""
    task: Hashable
    """The model's second argument, where it takes one; the piece is then one task's."""
    segments: Segments
    """Which examples are whose."""
    vectorised: bool = False
    """Whether the losses of all tasks can be one call, see `losses.is_plain_cross_entropy`."""
    entries: SparseEntries | None = None
    """The non-zero entries of x, or of what x was sampled from, where they are few."""
    positions: Tensor | None = None
    """(N,) int64: the examples of `entries` that x is made of; None for all of them."""

    def of_tasks(self, tasks: slice) -> Piece:
        """The part that belongs to some of the tasks."""
        sizes = self.segments.sizes[tasks]
        if len(sizes) == len(self.segments.sizes):
            return self
        bounds = [0, *accumulate(self.segments.sizes)]
        examples = slice(bounds[tasks.start], bounds[tasks.start] + sum(sizes))
        positions, entries = self.positions, self.entries
        if positions is not None:
            positions = positions[examples]
        elif entries is not None:
            entries = entries.of_tasks(tasks, examples, len(self.segments.sizes))
        return self._replace(
            x=self.x[examples], y=self.y[examples], segments=Segments(sizes), entries=entries, positions=positions
        )
