"""The examples of all past tasks in one mini-batch, put together once and used until the memory changes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gem_fast.gradients.fused.entries import SparseEntries, TaskEntries
from gem_fast.gradients.fused.losses import is_plain_cross_entropy
from gem_fast.gradients.fused.recorder import CannotFuse
from gem_fast.gradients.fused.task_batch import TaskBatch, TaskSizes
from gem_fast.gradients.interface import Batch, Sample


class BatchCache:
    """Keeps the last concatenation, and what it was made of, for as long as that has not changed.

    A past task's examples stay the same from step to step: copying them in each would cost more than the projection.
    """

    def __init__(self, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loss_fn = loss_fn
        self._sources: list[tuple[Tensor, int]] = []
        self._entries: list[TaskEntries | None] = []
        self._all: TaskBatch | None = None

    def __call__(self, batches: Sequence[Batch], sample: Sample | None, rows: slice) -> TaskBatch:
        """The examples that count, of the batches `rows`: one batch per task.

        Raises:
            CannotFuse: the tasks' examples differ in shape, dtype or device.
        """
        tensors = [x for batch in batches for x in (batch.x, batch.y)]
        if not self._holds(tensors):
            self._fill(batches, tensors)
        assert self._all is not None
        if sample is None:
            return self._all.of_tasks(rows)
        start = sum(sample.sizes[: rows.start])
        sizes = sample.sizes[rows]
        positions = sample.positions[start : start + sum(sizes)]
        y = self._all.y.index_select(0, positions.to(self._all.y.device))
        return replace(self._all, y=y, tasks=TaskSizes(sizes), positions=positions)

    def _holds(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self._sources) and all(
            _is_unchanged(new, old, version) for new, (old, version) in zip(tensors, self._sources, strict=True)
        )

    def _fill(self, batches: Sequence[Batch], tensors: list[Tensor]) -> None:
        for name, ours in (("inputs", tensors[::2]), ("targets", tensors[1::2])):
            kinds = {(x.shape[1:], x.dtype, x.device) for x in ours}
            if len(kinds) > 1:
                raise CannotFuse(f"the tasks' {name} differ in shape, dtype or device")
        # An inference tensor has no version, so that a change of it would go unnoticed: it is copied each time.
        tracked = not any(x.is_inference() for x in tensors)
        entries = self._entries_of(tensors[::2]) if tracked else None
        self._entries = self._entries if tracked else []
        self._sources = [(x, x._version) for x in tensors] if tracked else []
        x, y = torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches])
        tasks = TaskSizes([len(batch.x) for batch in batches])
        self._all = TaskBatch(x, y, None, tasks, is_plain_cross_entropy(self.loss_fn, y), entries)

    def _entries_of(self, inputs: list[Tensor]) -> SparseEntries | None:
        """The tasks' entries, prepared anew only for those whose examples are not the ones they were."""
        before = list(zip(self._sources[::2], self._entries, strict=True))
        self._entries = [
            next((known for source, known in before if _is_unchanged(x, *source)), None) or TaskEntries.of(x)
            for x in inputs
        ]
        tasks = [task for task in self._entries if task is not None]
        few_enough = sum(x.numel() for x in inputs) < 2**31
        return SparseEntries(tasks) if len(tasks) == len(inputs) and few_enough else None


def _is_unchanged(new: Tensor, old: Tensor, version: int) -> bool:
    # The sources are kept alive, so that no other tensor can come to lie where they are.
    return (new is old or _same_place(new, old)) and new._version == version


def _same_place(new: Tensor, old: Tensor) -> bool:
    where = new.data_ptr() == old.data_ptr() and new.stride() == old.stride()
    return where and new.shape == old.shape and new.dtype == old.dtype
