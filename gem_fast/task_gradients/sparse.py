"""A memory of mostly zeros: the entries that are not, prepared once for as long as the memory stays the same."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Above this part of non-zero entries a dense product is as fast (bench/README.md).
MOST_DENSE = 0.3


class SparseEntries(NamedTuple):
    """The non-zero entries of x (N, d), by rows and by columns of each task."""

    row_start: Tensor
    """(N blocks + 1,) int32, for blocks of 32 columns."""
    columns: Tensor
    """(entries,) int32."""
    values: Tensor
    """(entries,)."""
    column_start: Tensor
    """(t (groups + 1),) int32, for groups of one or two neighbouring columns."""
    rows: Tensor
    """(entries of groups,) int32, counted from the task's first row."""
    column_values: Tensor
    """(entries of groups, 1 or 2)."""

    @classmethod
    def of(cls, x: Tensor, sizes: list[int]) -> SparseEntries | None:
        """The entries of x (N, ...), with its examples flattened; None where a dense product serves as well.

        Args:
            x: contiguous inputs, one task after the other.
            sizes: the number of examples of each task.
        """
        usable = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and 0 < x.numel() < 2**31
        if not usable or int(torch.count_nonzero(x)) > MOST_DENSE * x.numel():
            return None
        return cls(*torch.ops.gem_fast._sparse_entries(x.flatten(1), sizes))

    def of_tasks(self, tasks: slice, examples: slice, n: int, t: int) -> SparseEntries:
        """The entries of some of the t tasks, which are those of some of the n examples."""
        per_task, per_example = len(self.column_start) // t, (len(self.row_start) - 1) // n
        return self._replace(
            row_start=self.row_start[examples.start * per_example : examples.stop * per_example + 1],
            column_start=self.column_start[tasks.start * per_task : tasks.stop * per_task],
        )

    @property
    def by_rows(self) -> list[Tensor]:
        """What operators take in the place of x, together with positions or for the forward."""
        return list(self[:3])

    @property
    def by_columns(self) -> list[Tensor]:
        """What they take for the gradient of all rows."""
        return list(self[3:])

    def linear(self, positions: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x[positions] W' + b, (n, outputs)."""
        y: Tensor = torch.ops.gem_fast._sparse_linear(*self.by_rows, positions, weight, bias)
        return y
