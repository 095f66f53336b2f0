"""The examples of all past tasks in one mini-batch, put together once and used until the memory changes."""

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from gem_fast.batches import DoNotFit, concatenate
from gem_fast.containers import tensors
from gem_fast.gradients.fused.entries import SparseEntries, TaskEntries
from gem_fast.gradients.fused.losses import is_plain_cross_entropy
from gem_fast.gradients.fused.recorder import CannotFuse
from gem_fast.gradients.fused.task_batch import Inputs, TaskBatch, TaskSizes
from gem_fast.gradients.interface import Batch, Constraint, Sample


class BatchCache:
    """Keeps the last concatenation, and what it was made of, for as long as that has not changed.

    A past task's examples stay the same from step to step: copying them in each would cost more than the projection.

    Attributes:
        made_of: the constraints that the last batches came from.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        self.loss_fn = loss_fn
        self.made_of: Sequence[Constraint] | None = None
        self._last: list[Batch] = []
        self._sources: list[tuple[Tensor, int]] = []
        self._versions: list[int] = []
        self._entries: list[tuple[Tensor, int, TaskEntries | None]] = []  # of inputs (x, version)
        self._all: TaskBatch | None = None
        self._sizes: TaskSizes | None = None  # of the last sample

    def __call__(self, batches: Sequence[Batch], sample: Sample | None, rows: slice) -> TaskBatch:
        """The examples that count, of the batches `rows`: one batch per task.

        Raises:
            CannotFuse: the tasks' examples differ in structure, shape, dtype or device, and there is no padding.
        """
        if self._all is not None and self._are_the_last(batches):
            return self._chosen(sample, rows)
        sources = [x for batch in batches for x in (batch.x, batch.y)]
        if not all(isinstance(x, Tensor) for x in sources):
            sources = [x for source in sources for x in tensors(source)]
        if not self._holds(sources):
            self._fill(batches, sources)
        self._last = list(batches) if self._sources else []
        return self._chosen(sample, rows)

    def again(self, constraints: Sequence[Constraint], sample: Sample | None) -> TaskBatch | None:
        """The examples of the same constraints that count now; None where these are others, or have changed."""
        if self._all is None or self.made_of is not constraints or not self._last or not self._are_unchanged():
            return None
        return self._chosen(sample, slice(0, len(constraints)))

    def _are_unchanged(self) -> bool:
        return [source._version for source, _ in self._sources] == self._versions

    def _are_the_last(self, batches: Sequence[Batch]) -> bool:
        """Whether these are the very batches of the last call, unchanged: the quick way to say so."""
        return len(batches) == len(self._last) and all(map(is_, batches, self._last)) and self._are_unchanged()

    def _chosen(self, sample: Sample | None, rows: slice) -> TaskBatch:
        assert self._all is not None
        if sample is None:
            return self._all.of_tasks(rows)
        sizes, positions = sample.sizes, sample.positions
        if rows != slice(0, len(sizes)):
            start = sum(sizes[: rows.start])
            sizes = sizes[rows]
            positions = positions[start : start + sum(sizes)]
        if self._sizes is None or self._sizes.sizes != sizes:
            self._sizes = TaskSizes(sizes)
        every = self._all  # without dataclasses.replace, which takes as long as all the rest
        return TaskBatch(
            every.inputs, every.targets, None, self._sizes, every.plain_cross_entropy, every.entries, positions
        )

    def _holds(self, sources: list[Tensor]) -> bool:
        return len(sources) == len(self._sources) and all(
            _is_unchanged(new, old, version) for new, (old, version) in zip(sources, self._sources, strict=True)
        )

    def _fill(self, batches: Sequence[Batch], sources: list[Tensor]) -> None:
        # An inference tensor has no version, so that a change of it would go unnoticed: it is copied each time.
        is_tracked = not any(source.is_inference() for source in sources)
        self._sources = [(source, source._version) for source in sources] if is_tracked else []
        self._versions = [version for _, version in self._sources]
        inputs = [batch.x for batch in batches]
        has_entries = is_tracked and _are_alike(inputs)
        entries = self._entries_of(inputs) if has_entries else None
        self._entries = self._entries if has_entries else []
        y = _together("y", "targets", batches)
        # What is kept as entries need not be put together.
        x = Inputs(inputs if entries is not None else [_together("x", "inputs", batches)])
        tasks = TaskSizes([batch.size for batch in batches])
        self._all = TaskBatch(x, y, None, tasks, is_plain_cross_entropy(self.loss_fn, y), entries)

    def _entries_of(self, inputs: list[Tensor]) -> SparseEntries | None:
        """The tasks' entries, prepared anew only for those whose examples are not the ones they were."""
        known = [
            next((entries for old, version, entries in self._entries if _is_unchanged(x, old, version)), None)
            or TaskEntries.of(x)
            for x in inputs
        ]
        self._entries = [(x, x._version, entries) for x, entries in zip(inputs, known, strict=True)]
        tasks = [task for task in known if task is not None]
        few_enough = sum(x.numel() for x in inputs) < 2**31
        return SparseEntries(tasks) if len(tasks) == len(inputs) and few_enough else None


def _together(name: str, kind: str, batches: Sequence[Batch]) -> Any:
    try:
        return concatenate(name, [getattr(batch, name) for batch in batches], batches[0].pad)
    except DoNotFit as error:
        raise CannotFuse(f"the tasks' {kind} differ in structure, shape, dtype or device") from error


def _are_alike(inputs: Sequence[Any]) -> bool:
    """Whether these are tensors whose examples have one shape and dtype, on one device."""
    are_tensors = all(isinstance(x, Tensor) for x in inputs)
    return are_tensors and len({(x.shape[1:], x.dtype, x.device) for x in inputs}) == 1


def _is_unchanged(new: Tensor, old: Tensor, version: int) -> bool:
    # The sources are kept alive, so that no other tensor can come to lie where they are.
    return (new is old or _same_place(new, old)) and new._version == version


def _same_place(new: Tensor, old: Tensor) -> bool:
    where = new.data_ptr() == old.data_ptr() and new.stride() == old.stride()
    return where and new.shape == old.shape and new.dtype == old.dtype
