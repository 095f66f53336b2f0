"""Examples selected by herding (Welling, 2009; Rebuffi et al., 2017, Algorithm 4)."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gem_fast.batches import Pad, select, size_of
from gem_fast.containers import Nest, Objects
from gem_fast.memory.base import Collate, PolicyMemory, Size
from gem_fast.memory.buffer import ExampleBuffer, as_state
from gem_fast.memory.checks import check_size
from gem_fast.memory.last import RingBuffer
from gem_fast.state import check_count

Features = Callable[[Nest], Tensor]


class HerdingMemory(PolicyMemory):
    """Of each class of a task the examples whose mean of features follows that of all, m of all classes together.

    While a task is learned its last `candidates` examples are kept. When another task comes, m of them are selected, in
    equal numbers of each class as far as there are any. Where m is not a multiple of the number of classes, or smaller
    than it, the slots left over go to the classes of which the other tasks have kept the fewest examples; among equals
    to those with the most candidates, then to those with the smallest numbers. Within a class examples are selected one
    by one: next is always the one that brings the mean of the selected ones' features closest to the mean of the class.
    For the current task, `examples` selects among the candidates so far whenever it is called. When a task comes back,
    its selected examples are its first candidates. Targets must be classes: integers of shape (n,).

    Args:
        per_task: m, the number of examples kept per task: `n_memories` of the published code, `patterns_per_experience`
            of Avalanche's GEM and A-GEM, both of which keep the last m instead; "all" keeps every example.
        total: a budget of examples for all tasks instead, m = total // (tasks seen so far): `mem_size` of Avalanche's
            replay, `n_memories` of the published code's iCaRL. As m shrinks, those selected last are evicted.
        pad: as for `EpisodicMemory`.
        collate_fn: as for `EpisodicMemory`.
        feature_fn: features (n, ...) of inputs x (n, ...), of objects as `collate_fn` joins them. Called without
            gradients when examples are selected; it should leave the model's mode and torch's generators as they are,
            and it is not part of the state. The inputs themselves by default, where they are a tensor.
        candidates: how many examples of the current task are kept until it ends, at least as many as are selected;
            default 2048, or the size where that is larger.

    Raises:
        ValueError: both or neither sizes are given, one is not a positive number, or candidates is the smaller one.
        TypeError: a size is not an integer, or pad is no number.
    """

    state_keys = ("open",)
    needs_classes = True

    def __init__(
        self,
        per_task: Size | None = None,
        *,
        total: int | None = None,
        pad: Pad = None,
        collate_fn: Collate | None = None,
        feature_fn: Features = torch.Tensor.detach,
        candidates: int | None = None,
    ) -> None:
        super().__init__(per_task, total=total, pad=pad, collate_fn=collate_fn)
        size = sys.maxsize if per_task == "all" else per_task or total or 0
        if per_task == "all" and candidates is not None:
            raise ValueError(f'candidates must be None where per_task is "all", got {candidates}')
        if candidates is None:
            candidates = max(2048, size)
        check_size("candidates", candidates)
        if candidates < size:
            raise ValueError(f"candidates must be at least the {size} to be selected, got {candidates}")
        self.feature_fn = feature_fn
        self.candidates = candidates

    def _stored(self, x: Any, y: Nest) -> tuple[Nest, Nest]:
        x, y = super()._stored(x, y)
        if self.feature_fn is torch.Tensor.detach and not isinstance(x, Tensor):
            raise ValueError(f"feature_fn must be given where x is no tensor, got x of type {type(x).__name__}")
        return x, y

    def _new_buffer(self, capacity: int, x: Nest, y: Tensor) -> ExampleBuffer:
        return _HerdingBuffer(capacity, x, y, self.pad, self.candidates, self.feature_fn, self._labels_of_others)

    def _labels_of_others(self, buffer: ExampleBuffer) -> Tensor:
        """The classes (n,) of the examples that the other tasks have kept, on the CPU."""
        others = [other for other in self._buffers.values() if other is not buffer]
        return torch.cat([torch.empty(0, dtype=torch.int64), *(other.y[: other.count].cpu() for other in others)])


class _HerdingBuffer(ExampleBuffer):
    """The selected examples; and the candidates, from the first mini-batch of the task until it ends."""

    def __init__(
        self,
        capacity: int,
        x: Nest,
        y: Tensor,
        pad: Pad,
        max_candidates: int,
        feature_fn: Features,
        labels_of_others: Callable[[ExampleBuffer], Tensor],
    ) -> None:
        super().__init__(capacity, x, y, pad)
        self._max_candidates = max_candidates
        self._feature_fn = feature_fn
        self._labels_of_others = labels_of_others
        self._candidates: RingBuffer | None = None
        self._selection_is_current = True  # no candidate has come since the examples were selected

    def __len__(self) -> int:
        return self.count if self._candidates is None else min(self.capacity, len(self._candidates))

    def examples(self) -> tuple[Nest, Tensor]:
        """Views of the selected examples, in the order in which they were selected; selects them first if need be."""
        if not self._selection_is_current:
            x, y = self._candidates_by_age()
            with torch.no_grad():
                features = self._feature_fn(x.collated() if isinstance(x, Objects) else x)
            features = _check_features(features, size_of(x))
            order = select_by_herding(features, y, self.capacity, self._labels_of_others(self))
            self.store(slice(0, len(order)), select(x, order), select(y, order))
            self.count = len(order)
            self._selection_is_current = True
        return super().examples()

    def add(self, x: Nest, y: Tensor) -> None:
        """Adds to the candidates."""
        if self._candidates is None:
            self._candidates = RingBuffer(self._max_candidates, x, y, self._pad)
            if self.count:
                self._candidates.add(*super().examples())
        self._candidates.add(x, y)
        self._selection_is_current = False

    def end_task(self) -> None:
        """Selects for the last time, and evicts the other candidates."""
        self.examples()
        self._candidates = None

    def shrink(self, capacity: int) -> None:
        """Keeps those that were selected first."""
        if capacity < self.capacity:
            self.resize(capacity, torch.arange(min(capacity, self.count)))

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Moves or converts the selected examples and the candidates."""
        super().to(device, dtype)
        if self._candidates is not None:
            self._candidates.to(device, dtype)

    def state_dict(self) -> dict[str, Any]:
        """The candidates, the oldest first, where the task is open; else the selected examples."""
        if self._candidates is None:
            return {**super().state_dict(), "open": False}
        x, y = self._candidates_by_age()
        return {"x": as_state(x), "y": y, "open": True}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `ExampleBuffer.load_state_dict`."""
        if not isinstance(state["open"], bool):
            raise ValueError(f"open must be True or False, got {state['open']!r:.50}")
        if not state["open"]:
            super().load_state_dict(state)
            return
        check_count("the number of a task's candidates", size_of(state["x"]), 1, self._max_candidates)
        self.add(state["x"], state["y"])

    def _candidates_by_age(self) -> tuple[Nest, Tensor]:
        """Copies of the candidates, the oldest first."""
        assert self._candidates is not None
        slots = self._candidates.newest(self._max_candidates)
        return select(self._candidates.x, slots), select(self._candidates.y, slots)


def _check_features(features: Any, n: int) -> Tensor:
    """The features of n examples as rows, (n, d); raises where they are anything else."""
    if not isinstance(features, Tensor) or features.dim() == 0 or len(features) != n:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"feature_fn must return a tensor of shape ({n}, ...), one row per example, got {got}")
    if not bool(features.isfinite().all()):
        raise ValueError("feature_fn must return finite numbers, got others")
    return features.reshape(n, -1)


def select_by_herding(features: Tensor, y: Tensor, n: int, kept: Tensor) -> Tensor:
    """Selects examples of all classes, in equal numbers as far as there are any.

    Args:
        features: (size, d) real numbers.
        y: (size,) classes.
        n: how many to select.
        kept: (k,) classes, of the examples kept already: those with the fewest come first.

    Returns:
        The rows of min(n, size) examples, int64 on the CPU: the first one selected of every class, the second ones, ...
    """
    features, y, n = features.cpu().double(), y.cpu().long(), min(n, len(y))
    labels, counts = y.unique(return_counts=True)
    n_kept = torch.searchsorted(labels, kept[torch.isin(kept, labels)]).bincount(minlength=len(labels))
    turn = counts.argsort(descending=True, stable=True)
    turn = turn[n_kept[turn].argsort(stable=True)]
    # The share of a class: the smallest that gives n examples, where some classes have fewer.
    share = next((k for k in range(1, n) if int(counts.clamp(max=k).sum()) >= n), n)
    rows = [(y == label).nonzero().flatten() for label in labels[turn]]
    selected = [mine[herding_order(features[mine], share)] for mine in rows]
    rank = torch.cat([torch.arange(len(mine)) for mine in selected])
    return torch.cat(selected)[rank.argsort(stable=True)[:n]]


def herding_order(features: Tensor, n: int) -> Tensor:
    """Herding within one class: each next example brings the mean of those selected closest to the mean of all.

    Args:
        features: (size, d) real numbers.
        n: how many to select.

    Returns:
        The rows of min(n, size) examples, int64 on the device of `features`, in the order in which they were selected.
    """
    mean = features.mean(0)
    squares = features.square().sum(1)
    total = torch.zeros_like(mean)
    order = []
    for k in range(1, min(n, len(features)) + 1):
        # |k mean - total - f|^2 = |f|^2 - 2 f . (k mean - total) + what is the same for all
        row = (squares - features @ (2 * (k * mean - total))).argmin()
        order.append(row)
        total += features[row]
        squares[row] = torch.inf  # not again
    return torch.stack(order)
