"""The examples of all past tasks in one mini-batch, put together once and used until the memory changes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gem_fast.task_gradients.losses import is_plain_cross_entropy
from gem_fast.task_gradients.pieces import Piece, Segments, taken
from gem_fast.task_gradients.protocol import Batch, Sample
from gem_fast.task_gradients.recording import CannotFuse
from gem_fast.task_gradients.sparse import SparseEntries


class ExampleCache:
    """Keeps the last concatenation, and what it was made of, for as long as that has not changed.

    A past task's examples stay the same from step to step: copying them in each would cost more than the projection.
    """

    def __init__(self, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._loss_fn = loss_fn
        self._sources: list[tuple[Tensor, int]] = []
        self._all: Piece | None = None

    def __call__(self, batches: Sequence[Batch], sample: Sample | None, rows: slice) -> Piece:
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
        return replace(self._all, y=taken(self._all.y, positions), segments=Segments(sizes), positions=positions)

    def _holds(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self._sources) and all(
            # The sources are kept alive, so that no other tensor can come to lie where they are.
            (new is old or _same_place(new, old)) and new._version == version
            for new, (old, version) in zip(tensors, self._sources, strict=True)
        )

    def _fill(self, batches: Sequence[Batch], tensors: list[Tensor]) -> None:
        for name, ours in (("inputs", tensors[::2]), ("targets", tensors[1::2])):
            kinds = {(x.shape[1:], x.dtype, x.device) for x in ours}
            if len(kinds) > 1:
                raise CannotFuse(f"the tasks' {name} differ in shape, dtype or device")
        # An inference tensor has no version, so that a change of it would go unnoticed: it is copied each time.
        tracked = not any(x.is_inference() for x in tensors)
        self._sources = [(x, x._version) for x in tensors] if tracked else []
        x, y = torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches])
        segments = Segments([len(batch.x) for batch in batches])
        entries = SparseEntries.of(x, segments.sizes) if tracked else None
        self._all = Piece(x, y, None, segments, is_plain_cross_entropy(self._loss_fn, y), entries)


def _same_place(new: Tensor, old: Tensor) -> bool:
    where = new.data_ptr() == old.data_ptr() and new.stride() == old.stride()
    return where and new.shape == old.shape and new.dtype == old.dtype
