"""What goes through a model for some tasks: a batch of all of them, or one for each."""

from collections.abc import Sequence

from gem_fast.containers import Objects
from gem_fast.gradients.fused.batch_cache import BatchCache
from gem_fast.gradients.fused.descriptors import DescriptorCache
from gem_fast.gradients.fused.model import FusedModel
from gem_fast.gradients.fused.recorder import CannotFuse
from gem_fast.gradients.fused.task_batch import TaskBatch
from gem_fast.gradients.interface import Constraint, Sample


class TaskBatches:
    """Puts the tasks' examples together anew only where they have changed, and their descriptors likewise."""

    def __init__(self) -> None:
        self._cache: BatchCache | None = None
        self._descriptors = DescriptorCache()

    def __call__(
        self, model: FusedModel, constraints: Sequence[Constraint], sample: Sample | None, rows: slice
    ) -> list[TaskBatch]:
        """The examples that count, of the constraints `rows`, which are of one batch each.

        Raises:
            CannotFuse: they are objects, or differ in structure, shape, dtype or device, and there is no padding.
        """
        if any(isinstance(batch.x, Objects) for [batch] in constraints):
            raise CannotFuse("the examples are objects that collate_fn puts together")
        if model.call_per_task:
            sampled = constraints if sample is None else sample.of(constraints)
            return [TaskBatch.of(batch) for [batch] in sampled[rows]]
        loss_fn = model.objective.loss_fn
        if self._cache is None or self._cache.loss_fn != loss_fn:
            self._cache = BatchCache(loss_fn)
        batch = self._cache([batch for [batch] in constraints], sample, rows)
        self._cache.made_of = constraints
        return [self._descriptors(batch, [source for [source] in constraints[rows]])]

    def again(self, constraints: Sequence[Constraint], sample: Sample | None) -> TaskBatch | None:
        """As `BatchCache.again`."""
        return None if self._cache is None else self._cache.again(constraints, sample)
