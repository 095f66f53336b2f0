"""A memory of mostly zeros: the entries that are not, prepared once for as long as a task's examples stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

# Above this part of non-zero entries a dense product is as fast (bench/README.md).
MAX_DENSITY = 0.3


class TaskEntries:
    """The non-zero entries of one task's examples x (n, d): row by row, and when they are asked for, pairs of lines.

    Rows that are mostly not zero in the same places make a pair, and so do columns: whoever goes through a pair reads
    for both what would else be read for each.
    """

    def __init__(self, x: Tensor) -> None:
        """Takes x contiguous."""
        self._d = x.shape[1]
        # start (n blocks + 1,) int32 for blocks of 32 columns, columns (entries,) int32, values (entries,).
        self.by_rows: tuple[Tensor, ...] = torch.ops.gem_fast._sparse_rows(x)

    # Pairs: lines (2 pairs,) int32 (-1: none), start (pairs + 1,) int32, index (entries,) int32, values (entries, 2).

    @cached_property
    def row_pairs(self) -> tuple[Tensor, ...]:
        """The index is the column."""
        pairs: tuple[Tensor, ...] = torch.ops.gem_fast._sparse_pairs(*self.by_rows, self._d, False)
        return pairs

    @cached_property
    def column_pairs(self) -> tuple[Tensor, ...]:
        """The index is the row; a pair is within one block of 32 columns."""
        pairs: tuple[Tensor, ...] = torch.ops.gem_fast._sparse_pairs(*self.by_rows, self._d, True)
        return pairs

    @classmethod
    def of(cls, x: Tensor) -> TaskEntries | None:
        """The entries of x (n, ...), with its examples flattened; None where a dense product serves as well."""
        usable = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and 0 < x.numel() < 2**31
        if not usable or int(torch.count_nonzero(x)) > MAX_DENSITY * x.numel():
            return None
        return cls(x.flatten(1).contiguous())


class SparseEntries:
    """The entries of some tasks, one task after the other, as operators take them.

    Args:
        tasks: each task's own.
        whole: entries that these are a part of, so that they are views.
        first: the number of the first of these among them.
    """

    def __init__(self, tasks: Sequence[TaskEntries], whole: SparseEntries | None = None, first: int = 0) -> None:
        self._tasks = tasks
        self._whole = whole
        self._first = first

    @cached_property
    def by_rows(self) -> list[Tensor]:
        """For the forward of any rows, and the gradient of a sample of them."""
        return self._of_kind("by_rows")

    @cached_property
    def row_pairs(self) -> list[Tensor]:
        """For the forward of all rows."""
        return self._of_kind("row_pairs")

    @cached_property
    def column_pairs(self) -> list[Tensor]:
        """For the gradient of all rows."""
        return self._of_kind("column_pairs")

    def of_tasks(self, tasks: slice) -> SparseEntries:
        """The entries of some of the tasks."""
        return SparseEntries(self._tasks[tasks], self._whole or self, self._first + tasks.start)

    def linear(self, positions: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x[positions] W' + b, (n, outputs)."""
        y: Tensor = torch.ops.gem_fast._sparse_linear(*self.by_rows, positions, weight, bias)
        return y

    def _of_kind(self, kind: str) -> list[Tensor]:
        own = [getattr(task, kind) for task in (self._whole or self)._tasks]
        if self._whole is None:
            return _joined(own)
        *lines, start, index, values = getattr(self._whole, kind)
        bounds = [0, *accumulate(len(parts[-3]) - 1 for parts in own)]
        first, last = bounds[self._first], bounds[self._first + len(self._tasks)]
        return [*(pair[2 * first : 2 * last] for pair in lines), start[first : last + 1], index, values]


class LayerInput(NamedTuple):
    """A layer's input, as operators take it that form the gradients of its weight."""

    x: Tensor | None
    """(N, inputs); None where there are entries."""
    entries: list[Tensor]
    """By rows for a sample, else pairs of columns."""
    positions: Tensor | None
    """Of a sample, as for `TaskBatch`."""

    @classmethod
    def of(cls, x: Tensor | None, entries: SparseEntries | None, positions: Tensor | None) -> LayerInput:
        """x, which is not needed where there are entries."""
        if entries is None:
            return cls(x, [], None)
        return cls(None, entries.column_pairs if positions is None else entries.by_rows, positions)


def _joined(tasks: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Several tasks' tensors as one of each kind; the last three are start, index and values."""
    ends = [0, *accumulate(len(parts[-2]) for parts in tasks)]
    start = torch.cat([tasks[0][-3], *(parts[-3][1:] + end for parts, end in zip(tasks[1:], ends[1:-1], strict=True))])
    *lines, _, index, values = ([*kind] for kind in zip(*tasks, strict=True))
    return [*map(torch.cat, lines), start, torch.cat(index), torch.cat(values)]
