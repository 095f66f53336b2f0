"""What GEM asks of an engine that computes G."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.nn import Parameter


class Batch(NamedTuple):
    """Examples of one task from the memory; `task` is what a multi-head model is called with."""

    task: Hashable
    x: Tensor
    y: Tensor


class Sample(NamedTuple):
    """A choice of examples, some of each constraint, where not all of them are to count."""

    positions: Tensor
    """(n,) int64 on the CPU: positions in the concatenation of all constraints' examples, constraint by constraint."""
    sizes: list[int]
    """The number of examples of each constraint; n in total."""


class TaskRows(NamedTuple):
    """The gradients of the constraints."""

    G: Tensor
    """(t, p): row k is the gradient of constraint k, parameters flattened one after the other."""
    reached: list[bool]
    """Per parameter: whether any of the constraints computed depends on it."""


class TaskGradients(Protocol):
    """Computes G, leaving no trace: `.grad` and random number generators are as they were."""

    def __call__(
        self,
        constraints: Sequence[Sequence[Batch]],
        parameters: Sequence[Parameter],
        *,
        out: Tensor | None = None,
        rows: slice | None = None,
        sample: Sample | None = None,
    ) -> TaskRows:
        """Row k is the gradient of the mean loss over the examples of constraint k's batches (Eq. 5).

        Args:
            constraints: t lists of batches.
            parameters: whose gradients are wanted, in the order in which they make up a row.
            out: (t, p) of the parameters' dtype and device with contiguous rows, to be written to; by default a new
                matrix.
            rows: which rows to compute, start and stop; the others stay as they are in `out`. By default all.
            sample: which examples count; by default all. Each constraint is then one batch.
        """


def chosen(constraints: Sequence[Sequence[Batch]], sample: Sample | None) -> Sequence[Sequence[Batch]]:
    """The constraints with only the examples that count, as copies."""
    if sample is None:
        return constraints
    picked, start = [], 0
    for [batch], index in zip(constraints, sample.positions.split(sample.sizes), strict=True):
        mine = index - start
        start += len(batch.x)
        picked.append([Batch(batch.task, batch.x[mine.to(batch.x.device)], batch.y[mine.to(batch.y.device)])])
    return picked
