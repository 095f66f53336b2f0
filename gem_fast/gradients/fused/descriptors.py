"""Descriptors of tasks in a mini-batch of several: each example gets its task's, so that one call takes all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from gem_fast.batches import DoNotFit, concatenate
from gem_fast.containers import Nest, map_tensors
from gem_fast.gradients.fused.recorder import CannotFuse
from gem_fast.gradients.fused.task_batch import TaskBatch
from gem_fast.gradients.interface import Batch


class DescriptorCache:
    """Keeps the last mini-batch's descriptors for as long as its tasks, their sizes and descriptors are the same."""

    def __init__(self) -> None:
        self._of: list[Nest] = []
        self._sizes: list[int] = []
        self._rows: Nest = None

    def __call__(self, batch: TaskBatch, sources: Sequence[Batch]) -> TaskBatch:
        """As `with_descriptors`."""
        if not has_descriptors(sources):
            return batch
        descriptors, sizes = [source.descriptor for source in sources], batch.tasks.sizes
        is_same = len(descriptors) == len(self._of) and all(map(_is, descriptors, self._of)) and sizes == self._sizes
        if not is_same:
            self._rows = with_descriptors(batch, sources).descriptor
            self._of, self._sizes = descriptors, list(sizes)
        return replace(batch, descriptor=self._rows)


def has_descriptors(batches: Iterable[Batch]) -> bool:
    """Whether any of the batches' tasks has a descriptor."""
    return any(batch.descriptor is not None for batch in batches)


def with_descriptors(batch: TaskBatch, sources: Sequence[Batch]) -> TaskBatch:
    """The mini-batch with the descriptor of each example's task, (N, ...); as it is where the tasks have none.

    Args:
        batch: the examples of all tasks.
        sources: the batch of each task that these were taken from.

    Raises:
        CannotFuse: the descriptors differ in structure, shape, dtype or device.
    """
    if not has_descriptors(sources):
        return batch
    rows = [repeated(source.descriptor, n) for source, n in zip(sources, batch.tasks.sizes, strict=True)]
    try:
        return replace(batch, descriptor=concatenate("descriptor", rows))
    except DoNotFit as error:
        raise CannotFuse("the tasks' descriptors differ in structure, shape, dtype or device") from error


def repeated(descriptor: Nest, n: int) -> Nest:
    """A descriptor for n examples, as views: a first dimension of 1, or else a new one."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.expand(n, *(x.shape[1:] if x.dim() > 1 and len(x) == 1 else x.shape))

    return map_tensors(one, descriptor)


def _is(one: object, other: object) -> bool:
    return one is other
