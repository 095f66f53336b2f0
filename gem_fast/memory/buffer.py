"""The examples that a memory keeps of one task: a buffer of fixed capacity, which each policy fills in its own way."""

import abc
from typing import Any

import torch
from torch import Tensor

from gem_fast.state import check_count

# How many examples of a task can be counted: what a float64 counts exactly.
MAX_SEEN = 2**53


class ExampleBuffer(abc.ABC):
    """Up to `capacity` examples of one task, in its slots 0 ... `count` - 1.

    Args:
        capacity: how many examples are kept at most.
        x: inputs (n, ...) of the shape, dtype and device of those to come; none of them is kept yet.
        y: targets (n, ...), likewise.
    """

    def __init__(self, capacity: int, x: Tensor, y: Tensor) -> None:
        self.x = x.new_empty((capacity, *x.shape[1:]))
        self.y = y.new_empty((capacity, *y.shape[1:]))
        self.count = 0

    @property
    def capacity(self) -> int:
        """How many examples are kept at most."""
        return len(self.x)

    def __len__(self) -> int:
        return self.count

    def examples(self) -> tuple[Tensor, Tensor]:
        """Views of the kept examples."""
        if self.count == self.capacity:
            return self.x, self.y  # the same objects every time: an engine need not compare storages
        return self.x[: self.count], self.y[: self.count]

    @abc.abstractmethod
    def add(self, x: Tensor, y: Tensor) -> None:
        """Sees a mini-batch that `check_batch` has let pass."""

    @abc.abstractmethod
    def shrink(self, capacity: int) -> None:
        """Evicts examples for good until the new capacity is enough; does nothing where it is not smaller."""

    def end_task(self) -> None:  # noqa: B027 - most policies have nothing to do
        """Another task has begun."""

    def state_dict(self) -> dict[str, Any]:
        """Copies of the examples, and whatever else decides which ones are kept from here on."""
        x, y = self.examples()
        return {"x": x.clone(), "y": y.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Args:
            state: with an x and a y of the same shape, dtype and device as those given to the constructor.

        Raises:
            ValueError: the state is not one of such a buffer.
        """
        x, y = state["x"], state["y"]
        check_count("the number of a task's examples", len(x), 1, self.capacity)
        self.count = len(x)
        self.x[: self.count], self.y[: self.count] = x.detach(), y.detach()

    def check_batch(self, x: Tensor, y: Tensor) -> None:
        """Raises unless a mini-batch has the shape, dtype and device of those that came before."""
        for name, new, kept in (("x", x, self.x), ("y", y, self.y)):
            expected = (tuple(kept.shape[1:]), kept.dtype, kept.device)
            got = (tuple(new.shape[1:]), new.dtype, new.device)
            if expected != got:
                raise ValueError(
                    f"{name} must have the shape, dtype and device of the task's earlier examples, "
                    f"{_describe(*expected)}, got {_describe(*got)}"
                )

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Moves the examples, and converts those with a floating-point dtype."""
        self.x, self.y = (
            kept.to(device=device, dtype=dtype if kept.is_floating_point() else None) for kept in (self.x, self.y)
        )

    def store(self, slots: Tensor, x: Tensor, y: Tensor) -> None:
        """Writes examples into their slots; where there are none it writes nothing, so that `_version` stays."""
        if len(slots):
            self.x[slots.to(self.x.device)] = x
            self.y[slots.to(self.y.device)] = y

    def resize(self, capacity: int, keep: Tensor) -> None:
        """Changes the capacity, and keeps the examples in the slots `keep` (n,), n <= capacity, in that order."""
        x, y = self.x[keep.to(self.x.device)], self.y[keep.to(self.y.device)]
        self.x, self.y = x.new_empty((capacity, *x.shape[1:])), y.new_empty((capacity, *y.shape[1:]))
        self.count = len(keep)
        self.x[: self.count], self.y[: self.count] = x, y


def _describe(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"(n{''.join(f', {size}' for size in shape)}) {dtype} on {device}"
