"""The last examples of each class of each task, in equal numbers."""

from typing import Any

import torch
from torch import Tensor

from gem_fast.batches import Pad, select
from gem_fast.containers import Nest
from gem_fast.memory.base import PolicyMemory
from gem_fast.memory.buffer import MAX_SEEN, ExampleBuffer
from gem_fast.state import check_plain_tensor


class ClassBalancedMemory(PolicyMemory):
    """The last examples of each class of a task, in equal numbers, m of all classes together.

    A class with fewer examples than its share leaves the rest to the others; where m is not a multiple of the number of
    classes, or smaller than it, the slots left over go to the newest examples. Targets must be classes: integers of
    shape (n,).

    Args:
        per_task: m, the number of examples kept per task: `n_memories` of the published code, `patterns_per_experience`
            of Avalanche's GEM and A-GEM, both of which keep the last m of any class; "all" keeps every example.
        total: a budget of examples for all tasks instead, m = total // (tasks seen so far): `mem_size` of Avalanche's
            replay. The memories of old tasks shrink as new tasks come.
        pad: as for `EpisodicMemory`.
        collate_fn: as for `EpisodicMemory`.

    Raises:
        ValueError: both or neither are given, or a size is not a positive number.
        TypeError: a size is not an integer, or pad is no number.
    """

    state_keys = ("times",)
    needs_classes = True

    def _new_buffer(self, capacity: int, x: Nest, y: Tensor) -> ExampleBuffer:
        return _ClassBalancedBuffer(capacity, x, y, self.pad)


class _ClassBalancedBuffer(ExampleBuffer):
    """Examples with their times of arrival, counted from 0."""

    def __init__(self, capacity: int, x: Nest, y: Tensor, pad: Pad) -> None:
        super().__init__(capacity, x, y, pad)
        self.times = torch.empty(0, dtype=torch.int64)

    def add(self, x: Nest, y: Tensor) -> None:
        """Selects among the kept and the new examples; new ones go into the slots of evicted ones, then free ones."""
        before = self.times
        now = int(before.max()) + 1 if self.count else 0  # the newest example is always kept
        times = torch.cat([before, torch.arange(now, now + len(y))])
        selected = _select_balanced(torch.cat([self.y[: self.count], y]).cpu(), times, self.capacity)
        evicted = (~selected[: self.count]).nonzero().flatten()
        new = selected[self.count :].nonzero().flatten()
        count = int(selected.sum())
        slots = torch.cat([evicted, torch.arange(self.count, count)])
        self.store(slots, select(x, new), select(y, new))
        self.times = torch.cat([before, before.new_empty(count - self.count)])
        self.times[slots] = now + new
        self.count = count

    def shrink(self, capacity: int) -> None:
        """Keeps what a buffer of that capacity would have kept."""
        if capacity < self.capacity:
            keep = _select_balanced(self.y[: self.count].cpu(), self.times, capacity).nonzero().flatten()
            self.times = self.times[keep]
            self.resize(capacity, keep)

    def state_dict(self) -> dict[str, Any]:
        """The examples, and their times of arrival."""
        return {**super().state_dict(), "times": self.times.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `ExampleBuffer.load_state_dict`."""
        super().load_state_dict(state)
        times = state["times"]
        check_plain_tensor("times", times)
        if times.shape != (self.count,) or times.dtype != torch.int64:
            raise ValueError(f"times must be {self.count} integers, got {tuple(times.shape)}, {times.dtype}")
        if len(times.unique()) < len(times) or times.min() < 0 or times.max() > MAX_SEEN:
            raise ValueError(f"times must differ and lie between 0 and {MAX_SEEN}, got others")
        self.times = times.clone()


def _select_balanced(y: Tensor, times: Tensor, n: int) -> Tensor:
    """Selects the last example of every class, then the last but one of every class, and so on.

    Args:
        y: (size,) classes.
        times: (size,) int64, the time of arrival of each example.
        n: how many to select at most.

    Returns:
        (size,) bool: whether each example is selected.
    """
    newest_first = times.argsort(descending=True)
    by_class = y[newest_first].argsort(stable=True)
    _, counts = y[newest_first][by_class].unique_consecutive(return_counts=True)
    rank = torch.empty_like(by_class)  # 0 for the last example of its class
    rank[by_class] = torch.arange(len(y)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    selected = torch.zeros(len(y), dtype=torch.bool)
    selected[newest_first[rank.argsort(stable=True)[:n]]] = True
    return selected
