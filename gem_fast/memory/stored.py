"""The stored examples of some tasks as batches, put together anew only where the memory has changed."""

from collections.abc import Callable, Hashable, Sequence
from operator import is_

import torch

from gem_fast.batches import device_of
from gem_fast.containers import Nest
from gem_fast.gradients.interface import Batch, Constraint
from gem_fast.memory.base import PolicyMemory
from gem_fast.memory.protocol import Memory


class StoredBatches:
    """Asks a memory for its tasks' examples, and keeps the answer for as long as the memory says it is the same.

    Attributes:
        constraints: of each task of the last call its batch, none where the memory has none.
        counts: the number of examples of each of these tasks.
        device: where the examples are; the CPU where there are none.
    """

    def __init__(self) -> None:
        self._memory: Memory | None = None
        self._asked: list[Hashable] = []
        self._tasks: list[Hashable] = []
        self._stamps: list[int] = []
        self._descriptors: list[Nest] = []
        self._batches: list[Batch] = []
        self.constraints: list[Constraint] = []
        self.counts: list[int] = []
        self.device = torch.device("cpu")

    def __call__(
        self, memory: Memory, tasks: Sequence[Hashable], descriptors_of: Callable[[Sequence[Hashable]], list[Nest]]
    ) -> list[Batch]:
        """A batch for each of these tasks that the memory has; with a `PolicyMemory` the same list until it changes."""
        held = set(memory.tasks)
        mine = [task for task in tasks if task in held]
        stamps = memory.stamps(mine) if isinstance(memory, PolicyMemory) else []
        descriptors = descriptors_of(mine)
        is_same = memory is self._memory and tasks == self._asked and mine == self._tasks
        if not (stamps and is_same and stamps == self._stamps and all(map(is_, descriptors, self._descriptors))):
            pad = getattr(memory, "pad", None)
            self._memory, self._asked, self._tasks = memory, list(tasks), mine
            self._stamps, self._descriptors = stamps, descriptors
            self._batches = [
                Batch(task, *memory.examples(task), pad, descriptor)
                for task, descriptor in zip(mine, descriptors, strict=True)
            ]
            by_task = {batch.task: batch for batch in self._batches}
            self.constraints = [[by_task[task]] if task in by_task else [] for task in tasks]
            self.counts = [by_task[task].size if task in by_task else 0 for task in tasks]
            if self._batches:
                self.device = device_of(self._batches[0].x)
        return self._batches
