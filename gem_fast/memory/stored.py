"""The stored examples of some tasks as batches, put together anew only where the memory has changed."""

from collections.abc import Callable, Hashable, Sequence
from operator import is_

from gem_fast.containers import Nest
from gem_fast.gradients.interface import Batch
from gem_fast.memory.base import PolicyMemory
from gem_fast.memory.protocol import Memory


class StoredBatches:
    """Asks a memory for its tasks' examples, and keeps the answer for as long as the memory says it is the same.

    Attributes:
        sizes: the number of examples in each of the last batches.
    """

    def __init__(self) -> None:
        self._memory: Memory | None = None
        self._tasks: list[Hashable] = []
        self._stamps: list[int] = []
        self._descriptors: list[Nest] = []
        self._batches: list[Batch] = []
        self.sizes: list[int] = []

    def __call__(
        self, memory: Memory, tasks: Sequence[Hashable], descriptor_of: Callable[[Hashable], Nest]
    ) -> list[Batch]:
        """A batch for each of these tasks that the memory has; with a `PolicyMemory` the same list until it changes."""
        held = memory.tasks
        mine = [task for task in tasks if task in held]
        stamps = memory.stamps(mine) if isinstance(memory, PolicyMemory) else []
        descriptors = [descriptor_of(task) for task in mine]
        is_same = memory is self._memory and mine == self._tasks and all(map(is_, descriptors, self._descriptors))
        if not (stamps and is_same and stamps == self._stamps):
            pad = getattr(memory, "pad", None)
            self._memory, self._tasks, self._stamps, self._descriptors = memory, mine, stamps, descriptors
            self._batches = [
                Batch(task, *memory.examples(task), pad, descriptor)
                for task, descriptor in zip(mine, descriptors, strict=True)
            ]
            self.sizes = [batch.size for batch in self._batches]
        return self._batches
