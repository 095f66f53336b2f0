"""The last examples of each task: the paper's memory."""

from typing import Any

import torch
from torch import Tensor

from gem_fast.memory.base import PolicyMemory
from gem_fast.memory.kept import Kept
from gem_fast.state import check_count


class EpisodicMemory(PolicyMemory):
    """The last m examples of each task: the paper's memory.

    Args:
        per_task: m, the number of examples kept per task.
        total: a budget of examples for all tasks instead: m = total // (tasks seen so far), so that the memories of old
            tasks shrink to their last m examples as new tasks come.

    Raises:
        ValueError: both or neither are given, or a size is not a positive number.
        TypeError: a size is not an integer.
    """

    fields = ("next",)

    def _new(self, size: int, x: Tensor, y: Tensor) -> Kept:
        return Ring(size, x, y)


class Ring(Kept):
    """The last `size` examples; `next` is the place of the oldest one, where the next one goes."""

    def __init__(self, size: int, x: Tensor, y: Tensor) -> None:
        super().__init__(size, x, y)
        self.next = 0

    def write(self, x: Tensor, y: Tensor) -> None:
        """Puts the mini-batch in place of the oldest examples."""
        size = self.size
        x, y = x[-size:], y[-size:]
        first = min(len(x), size - self.next)
        for kept, new in ((self.x, x), (self.y, y)):
            kept[self.next : self.next + first] = new[:first]
            kept[: len(x) - first] = new[first:]
        self.next = (self.next + len(x)) % size
        self.count = min(self.count + len(x), size)

    def by_age(self, most: int) -> Tensor:
        """The places of the last `most` examples, the oldest first."""
        return torch.arange(self.next - min(most, self.count), self.next) % self.size

    def shrink(self, size: int) -> None:
        """Keeps the last `size` examples."""
        if size < self.size:
            self.resize(size, self.by_age(size))
            self.next = self.count % size

    def state(self) -> dict[str, Any]:
        """The examples as they lie, and the place of the oldest."""
        return {**super().state(), "next": self.next}

    def load(self, entry: dict[str, Any]) -> None:
        """Takes up what `state` returned; else raises ValueError."""
        super().load(entry)
        # A ring that is not full yet has been written from its start.
        least, most = (0, self.size - 1) if self.count == self.size else (self.count, self.count)
        check_count("next", entry["next"], least, most)
        self.next = entry["next"]
