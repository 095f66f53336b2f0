"""The stored examples of some tasks as batches, put together anew only where the memory has changed."""

from collections.abc import Hashable, Sequence

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
        self._batches: list[Batch] = []
        self.sizes: list[int] = []

    def __call__(self, memory: Memory, tasks: Sequence[Hashable]) -> list[Batch]:
        """A batch for each of these tasks that the memory has; with a `PolicyMemory` the same list until it changes."""
        held = memory.tasks
        mine = [task for task in tasks if task in held]
        stamps = memory.stamps(mine) if isinstance(memory, PolicyMemory) else []
        if not stamps or memory is not self._memory or mine != self._tasks or stamps != self._stamps:
            pad = getattr(memory, "pad", None)
            self._memory, self._tasks, self._stamps = memory, mine, stamps
            self._batches = [Batch(task, *memory.examples(task), pad) for task in mine]
            self.sizes = [batch.size for batch in self._batches]
        return self._batches
