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
    """(N + 1,) int32."""
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

    def of_tasks(self, tasks: slice, examples: slice, t: int) -> SparseEntries:
        """The entries of some of the t tasks, which are those of some of the examples."""
        per_task = len(self.column_start) // t
        return self._replace(
            row_start=self.row_start[examples.start : examples.stop + 1],
            column_start=self.column_start[tasks.start * per_task : tasks.stop * per_task],
        )

    def linear(self, positions: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x[positions] W' + b, (n, outputs)."""
        y: Tensor = torch.ops.gem_fast._sparse_linear(*self[:3], positions, weight, bias)
        return y

    def gradient_(self, out: Tensor, delta: Tensor, sizes: list[int], x: Tensor, positions: Tensor | None) -> None:
        """out[k] = sum over task k's rows of delta' x, for delta (n, outputs) and out (t, outputs, d).

        Args:
            out: written to.
            delta: the gradient at the layer's output.
            sizes: the number of rows of each task.
            x: (n, d), the rows themselves.
            positions: which of the entries' rows x is made of; None for all of them.
        """
        if positions is None:
            torch.ops.gem_fast._sparse_gradient_(out, delta, sizes, *self[3:])
        else:  # to have a sample's entries column by column would take longer than its zeros do
            torch.ops.gem_fast._linear_gradient_(out, delta, x, sizes)
