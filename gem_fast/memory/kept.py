"""The kept examples of one task: buffers that a policy writes into."""

import abc
from typing import Any

import torch
from torch import Tensor

from gem_fast.state import check_count

# How many examples of a task can be counted: what a float64 counts exactly.
MOST_SEEN = 2**53


class Kept(abc.ABC):
    """Up to `size` examples of one task.

    Args:
        size: how many are kept at the most.
        x: inputs (n, ...) of the shape, dtype and device of those to come; none of them is kept yet.
        y: targets (n, ...), likewise.
    """

    def __init__(self, size: int, x: Tensor, y: Tensor) -> None:
        self.x = x.new_empty((size, *x.shape[1:]))
        self.y = y.new_empty((size, *y.shape[1:]))
        self.count = 0

    @property
    def size(self) -> int:
        """How many examples are kept at the most."""
        return len(self.x)

    def __len__(self) -> int:
        return self.count

    def examples(self) -> tuple[Tensor, Tensor]:
        """Views of the kept examples."""
        if self.count == self.size:
            return self.x, self.y  # the same objects every time, which engines know again at a glance
        return self.x[: self.count], self.y[: self.count]

    @abc.abstractmethod
    def write(self, x: Tensor, y: Tensor) -> None:
        """Sees a mini-batch that `check` has found to fit."""

    @abc.abstractmethod
    def shrink(self, size: int) -> None:
        """Gives up examples until there are at most `size`, for good; does nothing where size is not smaller."""

    def close(self) -> None:  # noqa: B027 - most policies have nothing to do
        """Another task has come."""

    def state(self) -> dict[str, Any]:
        """Copies of the examples, and whatever else decides how it goes on."""
        x, y = self.examples()
        return {"x": x.clone(), "y": y.clone()}

    def load(self, entry: dict[str, Any]) -> None:
        """Takes up what `state` returned, with an x and a y like those of the constructor; else raises ValueError."""
        x, y = entry["x"], entry["y"]
        check_count("the number of a task's examples", len(x), 1, self.size)
        self.count = len(x)
        self.x[: self.count], self.y[: self.count] = x.detach(), y.detach()

    def check(self, x: Tensor, y: Tensor) -> None:
        """Raises unless a mini-batch is like those that came before."""
        for name, new, kept in (("x", x, self.x), ("y", y, self.y)):
            mine = (tuple(kept.shape[1:]), kept.dtype, kept.device)
            theirs = (tuple(new.shape[1:]), new.dtype, new.device)
            if mine != theirs:
                raise ValueError(
                    f"{name} must have the shape, dtype and device of the task's earlier examples, "
                    f"{_describe(*mine)}, got {_describe(*theirs)}"
                )

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Moves the examples, and converts those with a floating-point dtype."""
        self.x, self.y = (
            kept.to(device=device, dtype=dtype if kept.is_floating_point() else None) for kept in (self.x, self.y)
        )

    def put(self, places: Tensor, x: Tensor, y: Tensor) -> None:
        """Writes examples into the buffers, each to its place; no places, no write, so `_version` tells of changes."""
        if len(places):
            self.x[places.to(self.x.device)] = x
            self.y[places.to(self.y.device)] = y

    def resize(self, size: int, keep: Tensor) -> None:
        """Goes on with the examples at some places, in buffers of another size."""
        x, y = self.x[keep.to(self.x.device)], self.y[keep.to(self.y.device)]
        self.x, self.y = x.new_empty((size, *x.shape[1:])), y.new_empty((size, *y.shape[1:]))
        self.count = len(keep)
        self.x[: self.count], self.y[: self.count] = x, y


def _describe(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"(n{''.join(f', {size}' for size in shape)}) {dtype} on {device}"
