"""Mini-batches made of several tasks' examples."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

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


@dataclass(frozen=True)
class Piece:
    """What goes through the model in one forward.

    Attributes:
        memory: (M, ...): inputs, one task after the other.
        y: (N, ...): targets.
        task: the model's second argument, where it takes one; the piece is then one task's.
        segments: which examples are whose.
        vectorised: whether the losses of all tasks can be one call, see `losses.is_plain_cross_entropy`.
        entries: the non-zero entries of `memory`, where they are few.
        positions: (N,) int64: the examples of `memory` that count; None for all of them.
    """

    memory: Tensor
    y: Tensor
    task: Hashable
    segments: Segments
    vectorised: bool = False
    entries: SparseEntries | None = None
    positions: Tensor | None = None

    @cached_property
    def x(self) -> Tensor:
        """(N, ...): the inputs. Of a sample they are copied when first asked for: its entries may be all it takes."""
        return self.memory if self.positions is None else taken(self.memory, self.positions)

    def of_tasks(self, tasks: slice) -> Piece:
        """The part that belongs to some of the tasks."""
        sizes = self.segments.sizes[tasks]
        if len(sizes) == len(self.segments.sizes):
            return self
        bounds = [0, *accumulate(self.segments.sizes)]
        examples = slice(bounds[tasks.start], bounds[tasks.start] + sum(sizes))
        part = replace(self, y=self.y[examples], segments=Segments(sizes))
        if self.positions is not None:
            return replace(part, positions=self.positions[examples])
        entries = self.entries and self.entries.of_tasks(tasks)
        return replace(part, memory=self.memory[examples], entries=entries)


def taken(x: Tensor, positions: Tensor) -> Tensor:
    """x[positions], for positions on the CPU."""
    return x.index_select(0, positions.to(x.device))
