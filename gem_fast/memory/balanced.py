"""The last examples of each class of each task, in equal numbers."""

from typing import Any

import torch
from torch import Tensor

from gem_fast.memory.base import PolicyMemory
from gem_fast.memory.checks import check_classes
from gem_fast.memory.kept import MOST_SEEN, Kept
from gem_fast.state import check_plain_tensor


class ClassBalancedMemory(PolicyMemory):
    """The last examples of each class of a task, in equal numbers, m of all classes together.

    A class with fewer examples than its share leaves the rest to the others; where m is not a multiple of the number of
    classes, or smaller than it, the places left over go to the newest examples. Targets must be classes: integers of
    shape (n,).

    Args:
        per_task: m, the number of examples kept per task.
        total: a budget of examples for all tasks instead: m = total // (tasks seen so far), so that the memories of old
            tasks shrink as new tasks come.

    Raises:
        ValueError: both or neither are given, or a size is not a positive number.
        TypeError: a size is not an integer.
    """

    fields = ("times",)

    def _new(self, size: int, x: Tensor, y: Tensor) -> Kept:
        return _Balanced(size, x, y)

    def _check(self, x: Tensor, y: Tensor) -> None:
        super()._check(x, y)
        check_classes(y)


class _Balanced(Kept):
    """Examples with the times at which they came, counted from 0."""

    def __init__(self, size: int, x: Tensor, y: Tensor) -> None:
        super().__init__(size, x, y)
        self.times = torch.empty(size, dtype=torch.int64)

    def write(self, x: Tensor, y: Tensor) -> None:
        """Puts those of the mini-batch that belong among the kept into the places of those that do not any more."""
        before = self.times[: self.count]
        now = int(before.max()) + 1 if self.count else 0  # the newest example is always kept
        times = torch.cat([before, torch.arange(now, now + len(y))])
        kept = _balanced(torch.cat([self.y[: self.count], y]).cpu(), times, self.size)
        new = kept[self.count :].nonzero().flatten()
        given_up = (~kept[: self.count]).nonzero().flatten()
        count = int(kept.sum())
        places = torch.cat([given_up, torch.arange(self.count, count)])
        self.put(places, x[new.to(x.device)], y[new.to(y.device)])
        self.times[places] = now + new
        self.count = count

    def shrink(self, size: int) -> None:
        """Keeps what a memory of that size would have kept."""
        if size < self.size:
            times = self.times[: self.count]
            keep = _balanced(self.y[: self.count].cpu(), times, size).nonzero().flatten()
            self.times = torch.cat([times[keep], times.new_empty(size - len(keep))])
            self.resize(size, keep)

    def state(self) -> dict[str, Any]:
        """The examples, and when they came."""
        return {**super().state(), "times": self.times[: self.count].clone()}

    def load(self, entry: dict[str, Any]) -> None:
        """Takes up what `state` returned; else raises ValueError."""
        super().load(entry)
        times = entry["times"]
        check_plain_tensor("times", times)
        if times.shape != (self.count,) or times.dtype != torch.int64:
            raise ValueError(f"times must be {self.count} integers, got {tuple(times.shape)}, {times.dtype}")
        if len(times.unique()) < len(times) or times.min() < 0 or times.max() > MOST_SEEN:
            raise ValueError(f"times must differ and lie between 0 and {MOST_SEEN}, got others")
        self.times[: self.count] = times


def _balanced(y: Tensor, times: Tensor, size: int) -> Tensor:
    """Which `size` examples to keep: first the last one of every class, then the last but one, and so on.

    Args:
        y: (n,) classes.
        times: (n,) int64, when each example came.
        size: how many to keep at the most.

    Returns:
        (n,) bool.
    """
    newest_first = times.argsort(descending=True)
    by_class = y[newest_first].argsort(stable=True)
    _, counts = y[newest_first][by_class].unique_consecutive(return_counts=True)
    rank = torch.empty_like(by_class)  # 0 for the last example of its class
    rank[by_class] = torch.arange(len(y)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    kept = torch.zeros(len(y), dtype=torch.bool)
    kept[newest_first[rank.argsort(stable=True)[:size]]] = True
    return kept
