"""A random sample of each task's examples (reservoir sampling: Vitter, 1985)."""

from typing import Any

import torch
from torch import Tensor

from gem_fast.memory.base import PolicyMemory
from gem_fast.memory.kept import MOST_SEEN, Kept
from gem_fast.state import check_count, check_generator, check_keys


class ReservoirMemory(PolicyMemory):
    """A random sample of each task's examples: each one seen so far is as likely to be kept as any other.

    Args:
        per_task: m, the number of examples kept per task.
        total: a budget of examples for all tasks instead: m = total // (tasks seen so far). As it shrinks, samples of
            old tasks are sampled again.
        seed: of the generator that draws; part of the memory's state, and the only one it touches.

    Raises:
        ValueError: both or neither sizes are given, or one is not a positive number.
        TypeError: a size is not an integer.
    """

    fields = ("seen",)

    def __init__(self, per_task: int | None = None, *, total: int | None = None, seed: int = 0) -> None:
        super().__init__(per_task, total=total)
        self._generator = torch.Generator().manual_seed(seed)

    def _new(self, size: int, x: Tensor, y: Tensor) -> Kept:
        return _Sample(size, x, y, self._generator)

    def state_dict(self) -> dict[str, Any]:
        """As for `EpisodicMemory`, with the generator's state."""
        return {**super().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As for `EpisodicMemory`."""
        check_keys("state", state, ("per_task", "total", "tasks", "generator"))
        check_generator(state["generator"])
        super().load_state_dict({name: value for name, value in state.items() if name != "generator"})
        self._generator.set_state(state["generator"])


class _Sample(Kept):
    """A uniform sample of the `seen` examples."""

    def __init__(self, size: int, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        super().__init__(size, x, y)
        self.seen = 0
        self._generator = generator

    def write(self, x: Tensor, y: Tensor) -> None:
        """Example number i, counted from 1, takes one of the `size` places with probability size / i."""
        free = min(self.size - self.count, len(x))
        numbers = torch.arange(self.seen + free + 1, self.seen + len(x) + 1)
        drawn = (torch.rand(len(numbers), generator=self._generator, dtype=torch.float64) * numbers).long().tolist()
        # Of several examples for one place the last one stays.
        rows = {self.count + row: row for row in range(free)}
        rows |= {place: row for row, place in enumerate(drawn, start=free) if place < self.size}
        places = torch.tensor(list(rows), dtype=torch.int64)
        taken = torch.tensor(list(rows.values()), dtype=torch.int64)
        self.put(places, x[taken.to(x.device)], y[taken.to(y.device)])
        self.count += free
        self.seen += len(x)

    def shrink(self, size: int) -> None:
        """Keeps a random sample of the sample."""
        if size < self.size:
            self.resize(size, torch.randperm(self.count, generator=self._generator)[:size])

    def state(self) -> dict[str, Any]:
        """The examples, and how many were seen."""
        return {**super().state(), "seen": self.seen}

    def load(self, entry: dict[str, Any]) -> None:
        """Takes up what `state` returned; else raises ValueError."""
        super().load(entry)
        # As long as there is room, all that was seen is kept.
        check_count("seen", entry["seen"], self.count, MOST_SEEN if self.count == self.size else self.count)
        self.seen = entry["seen"]
