"""The last examples of each task: the paper's memory."""

from typing import Any

import torch
from torch import Tensor

from gem_fast.batches import Pad, select, size_of
from gem_fast.containers import Nest
from gem_fast.memory.base import PolicyMemory
from gem_fast.memory.buffer import ExampleBuffer
from gem_fast.state import check_count


class EpisodicMemory(PolicyMemory):
    """The last m examples of each task: the memory of the paper, of its published code and of Avalanche's GEM.

    Args:
        per_task: m, the number of examples kept per task: `n_memories` of the published code, `patterns_per_experience`
            of Avalanche's GEM and A-GEM; "all" keeps every example. The memory takes up what its examples need.
        total: a budget of examples for all tasks instead, m = total // (tasks seen so far): the memories of old tasks
            shrink to their last m examples as new tasks come.
        pad: what shorter examples of a task are right-padded with, up to the longest that the task has had in its
            memory: a number, or numbers by name ({"input_ids": 0, "labels": -100}; "x" and "y" name the inputs and
            targets as a whole, and a tensor without a value of its own takes that of what it is in). By default all
            examples of a task must have the same shape.
        collate_fn: for examples that are no tensors, graphs say: x is then a list of examples, which are kept as
            objects, and collate_fn(list) makes of some of them what the model takes, as for a DataLoader.

    Raises:
        ValueError: both or neither of the sizes are given, or one is not a positive number.
        TypeError: a size is not an integer, or pad is no number.
    """

    state_keys = ("next",)

    def _new_buffer(self, capacity: int, x: Nest, y: Nest) -> ExampleBuffer:
        return RingBuffer(capacity, x, y, self.pad)


class RingBuffer(ExampleBuffer):
    """The last `capacity` examples; the next one goes into the slot `next`, which holds the oldest one once full."""

    def __init__(self, capacity: int, x: Nest, y: Nest, pad: Pad = None) -> None:
        super().__init__(capacity, x, y, pad)
        self.next = 0

    def add(self, x: Nest, y: Nest) -> None:
        """Overwrites the oldest examples."""
        n, capacity = size_of(x), self.capacity
        start = max(0, n - capacity)  # of more than the capacity the last ones
        middle = min(n, start + capacity - self.next)  # those up to the ring's end; the rest goes to its start
        for slots, rows in (
            (slice(self.next, self.next + middle - start), slice(start, middle)),
            (slice(0, n - middle), slice(middle, n)),
        ):
            if rows.stop - rows.start == n:
                self.store(slots, x, y)
            elif rows.stop > rows.start:
                self.store(slots, select(x, rows), select(y, rows))
        self.next = (self.next + n - start) % capacity
        self.count = min(self.count + n - start, capacity)

    def newest(self, n: int) -> Tensor:
        """The slots of the last min(n, count) examples, the oldest of them first."""
        return torch.arange(self.next - min(n, self.count), self.next) % self.capacity

    def shrink(self, capacity: int) -> None:
        """Keeps the last `capacity` examples."""
        if capacity < self.capacity:
            self.resize(capacity, self.newest(capacity))
            self.next = self.count % capacity

    def state_dict(self) -> dict[str, Any]:
        """The examples in the order of their slots, and the next slot."""
        return {**super().state_dict(), "next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `ExampleBuffer.load_state_dict`."""
        super().load_state_dict(state)
        # A ring that is not full yet has been filled from slot 0.
        minimum, maximum = (0, self.capacity - 1) if self.count == self.capacity else (self.count, self.count)
        check_count("next", state["next"], minimum, maximum)
        self.next = state["next"]
