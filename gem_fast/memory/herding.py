"""Examples chosen by herding (Welling, 2009; Rebuffi et al., 2017, Algorithm 4)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gem_fast.memory.base import PolicyMemory
from gem_fast.memory.checks import check_classes, check_size
from gem_fast.memory.kept import Kept
from gem_fast.memory.last import Ring
from gem_fast.state import check_count

Features = Callable[[Tensor], Tensor]


class HerdingMemory(PolicyMemory):
    """Of each class of a task the examples whose mean of features follows that of all, m of all classes together.

    While a task is learned its last `candidates` examples are kept. When another task comes, m of them are chosen, in
    equal numbers of each class as far as there are any: class by class, each next example is the one that brings the
    mean of the features of those chosen closest to the class's. Until then `examples` chooses when it is asked. When a
    task comes back, those chosen are its first candidates. Targets must be classes: integers of shape (n,).

    Args:
        per_task: m, the number of examples kept per task.
        total: a budget of examples for all tasks instead: m = total // (tasks seen so far). Examples were chosen in
            order: as m shrinks, the last ones chosen are given up.
        feature_fn: features (n, ...) of inputs x (n, ...), called without gradients when examples are chosen; it should
            leave the model's mode and torch's generators as they are, and it is not part of the state. The inputs
            themselves by default.
        candidates: how many examples of the current task are kept until it is over, as many as are chosen at the least;
            default 2048, or the size where that is larger.

    Raises:
        ValueError: both or neither sizes are given, one is not a positive number, or candidates is the smaller one.
        TypeError: a size is not an integer.
    """

    fields = ("open",)

    def __init__(
        self,
        per_task: int | None = None,
        *,
        total: int | None = None,
        feature_fn: Features = torch.Tensor.detach,
        candidates: int | None = None,
    ) -> None:
        super().__init__(per_task, total=total)
        size = per_task or total or 0
        if candidates is None:
            candidates = max(2048, size)
        check_size("candidates", candidates)
        if candidates < size:
            raise ValueError(f"candidates must be at least the {size} to be chosen, got {candidates}")
        self.feature_fn = feature_fn
        self.candidates = candidates

    def _new(self, size: int, x: Tensor, y: Tensor) -> Kept:
        return _Herd(size, x, y, self.candidates, self.feature_fn)

    def _check(self, x: Tensor, y: Tensor) -> None:
        super()._check(x, y)
        check_classes(y)


class _Herd(Kept):
    """The chosen examples; and the candidates, from the task's first mini-batch until it is closed."""

    def __init__(self, size: int, x: Tensor, y: Tensor, candidates: int, feature_fn: Features) -> None:
        super().__init__(size, x, y)
        self._most = candidates
        self._feature_fn = feature_fn
        self._candidates: Ring | None = None
        self._chosen = True  # whether the examples are those to choose from the candidates

    def __len__(self) -> int:
        return self.count if self._candidates is None else min(self.size, len(self._candidates))

    def examples(self) -> tuple[Tensor, Tensor]:
        """Views of the chosen examples, in the order in which they were chosen; chooses them if need be."""
        if not self._chosen:
            x, y = self._in_order()
            with torch.no_grad():
                features = self._feature_fn(x)
            order = herd(_checked(features, len(x)), y, self.size)
            self.count = len(order)
            self.put(torch.arange(self.count), x[order.to(x.device)], y[order.to(y.device)])
            self._chosen = True
        return super().examples()

    def write(self, x: Tensor, y: Tensor) -> None:
        """Takes up candidates."""
        if self._candidates is None:
            self._candidates = Ring(self._most, x, y)
            if self.count:
                self._candidates.write(*super().examples())
        self._candidates.write(x, y)
        self._chosen = False

    def close(self) -> None:
        """Chooses, and gives up the other candidates."""
        self.examples()
        self._candidates = None

    def shrink(self, size: int) -> None:
        """Keeps those that were chosen first."""
        if size < self.size:
            self.resize(size, torch.arange(min(size, self.count)))

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Moves or converts the chosen examples and the candidates."""
        super().to(device, dtype)
        if self._candidates is not None:
            self._candidates.to(device, dtype)

    def state(self) -> dict[str, Any]:
        """The candidates, the oldest first, where the task is open; else the chosen examples."""
        if self._candidates is None:
            return {**super().state(), "open": False}
        x, y = self._in_order()
        return {"x": x, "y": y, "open": True}

    def load(self, entry: dict[str, Any]) -> None:
        """Takes up what `state` returned; else raises ValueError."""
        if not isinstance(entry["open"], bool):
            raise ValueError(f"open must be True or False, got {entry['open']!r:.50}")
        if not entry["open"]:
            super().load(entry)
            return
        check_count("the number of a task's candidates", len(entry["x"]), 1, self._most)
        self.write(entry["x"].detach(), entry["y"].detach())

    def _in_order(self) -> tuple[Tensor, Tensor]:
        """Copies of the candidates, the oldest first."""
        assert self._candidates is not None
        places = self._candidates.by_age(self._most)
        return self._candidates.x[places.to(self.x.device)], self._candidates.y[places.to(self.y.device)]


def _checked(features: Any, n: int) -> Tensor:
    if not isinstance(features, Tensor) or features.dim() == 0 or len(features) != n:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"feature_fn must return a tensor of shape ({n}, ...), one row per example, got {got}")
    if not bool(features.isfinite().all()):
        raise ValueError("feature_fn must return finite numbers, got others")
    return features.reshape(n, -1)


def herd(features: Tensor, y: Tensor, size: int) -> Tensor:
    """Chooses examples of all classes, in equal numbers as far as there are any.

    Args:
        features: (n, d) real numbers.
        y: (n,) classes.
        size: how many to choose.

    Returns:
        The places of min(size, n) examples, int64 on the CPU: the first choice of every class, the second one, ...
    """
    features, y = features.cpu().double(), y.cpu()
    labels, counts = y.unique(return_counts=True)
    # The share of a class: the least that gives `size` examples, where some classes have fewer.
    share = next((k for k in range(1, size) if int(counts.clamp(max=k).sum()) >= size), size)
    members = [(y == label).nonzero().flatten() for label in labels]
    chosen = [mine[_greedy(features[mine], min(share, len(mine)))] for mine in members]
    rank = torch.cat([torch.arange(len(mine)) for mine in chosen])
    return torch.cat(chosen)[rank.argsort(stable=True)[:size]]


def _greedy(features: Tensor, size: int) -> Tensor:
    """The places of `size` examples, each the one that brings the mean of those so far closest to the mean of all."""
    mean = features.mean(0)
    squares = features.square().sum(1)
    total = torch.zeros_like(mean)
    order = []
    for k in range(1, size + 1):
        # |k mean - total - f|^2 = |f|^2 - 2 f . (k mean - total) + what is the same for all
        place = int((squares - features @ (2 * (k * mean - total))).argmin())
        order.append(place)
        total += features[place]
        squares[place] = torch.inf  # chosen once
    return torch.tensor(order, dtype=torch.int64)
