"""A random sample of each task's examples (reservoir sampling: Vitter, 1985)."""

from typing import Any

import torch

from gem_fast.batches import Pad, select, size_of
from gem_fast.containers import Nest
from gem_fast.memory.base import Collate, PolicyMemory, Size
from gem_fast.memory.buffer import MAX_SEEN, ExampleBuffer
from gem_fast.state import check_count, check_generator, check_keys


class ReservoirMemory(PolicyMemory):
    """A random sample of each task's examples: each one seen so far is as likely to be kept as any other.

    Args:
        per_task: m, the number of examples kept per task: `n_memories` of the published code, `patterns_per_experience`
            of Avalanche's GEM and A-GEM, both of which keep other examples; "all" keeps every example.
        total: a budget of examples for all tasks instead, m = total // (tasks seen so far): `mem_size` of Avalanche's
            replay. As m shrinks, it is a random part of the sample that stays.
        pad: as for `EpisodicMemory`.
        collate_fn: as for `EpisodicMemory`.
        seed: of the generator that draws, 0 by default; its state is part of the memory's. torch's global generator is
            not used.

    Raises:
        ValueError: both or neither sizes are given, or one is not a positive number.
        TypeError: a size is not an integer, or pad is no number.
    """

    state_keys = ("seen",)

    def __init__(
        self,
        per_task: Size | None = None,
        *,
        total: int | None = None,
        pad: Pad = None,
        collate_fn: Collate | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(per_task, total=total, pad=pad, collate_fn=collate_fn)
        self._generator = torch.Generator().manual_seed(seed)

    def _new_buffer(self, capacity: int, x: Nest, y: Nest) -> ExampleBuffer:
        return _ReservoirBuffer(capacity, x, y, self.pad, self._generator)

    def state_dict(self) -> dict[str, Any]:
        """As for `EpisodicMemory`, with the generator's state."""
        return {**super().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As for `EpisodicMemory`."""
        check_keys("state", state, ("per_task", "total", "tasks", "generator"))
        check_generator(state["generator"])
        super().load_state_dict({name: value for name, value in state.items() if name != "generator"})
        self._generator.set_state(state["generator"])


class _ReservoirBuffer(ExampleBuffer):
    """A uniform sample of the `seen` examples."""

    def __init__(self, capacity: int, x: Nest, y: Nest, pad: Pad, generator: torch.Generator) -> None:
        super().__init__(capacity, x, y, pad)
        self.seen = 0
        self._generator = generator

    def add(self, x: Nest, y: Nest) -> None:
        """Fills free slots; after that, example number i, counted from 1, takes one with probability capacity / i."""
        n = size_of(x)
        free = min(self.capacity - self.count, n)
        numbers = torch.arange(self.seen + free + 1, self.seen + n + 1)
        drawn = (torch.rand(len(numbers), generator=self._generator, dtype=torch.float64) * numbers).long().tolist()
        # slot -> row of x: of several examples for one slot the last one stays.
        row_of = {self.count + row: row for row in range(free)}
        row_of |= {slot: row for row, slot in enumerate(drawn, start=free) if slot < self.capacity}
        slots, rows = (torch.tensor(list(part), dtype=torch.int64) for part in (row_of.keys(), row_of.values()))
        self.store(slots, select(x, rows), select(y, rows))
        self.count += free
        self.seen += n

    def shrink(self, capacity: int) -> None:
        """Keeps a random part of the sample, which is a uniform sample again."""
        if capacity < self.capacity:
            self.resize(capacity, torch.randperm(self.count, generator=self._generator)[:capacity])

    def state_dict(self) -> dict[str, Any]:
        """The examples, and how many were seen."""
        return {**super().state_dict(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `ExampleBuffer.load_state_dict`."""
        super().load_state_dict(state)
        # As long as there is room, all that was seen is kept.
        check_count("seen", state["seen"], self.count, MAX_SEEN if self.count == self.capacity else self.count)
        self.seen = state["seen"]
