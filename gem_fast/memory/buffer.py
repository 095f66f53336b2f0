"""The examples that a memory keeps of one task: a buffer of fixed capacity, which each policy fills in its own way."""

import abc
from itertools import count
from typing import Any

import torch
from torch import Tensor

from gem_fast import batches
from gem_fast.batches import Pad
from gem_fast.containers import Nest, Objects
from gem_fast.state import check_count

# How many examples of a task can be counted: what a float64 counts exactly.
MAX_SEEN = 2**53

_stamps = count(1)


class ExampleBuffer(abc.ABC):
    """Up to `capacity` examples of one task, in its slots 0 ... `count` - 1.

    There is room for as many as have come, twice as many each time that it runs out, up to the capacity.

    Args:
        capacity: how many examples are kept at most.
        x: inputs (n, ...) of the structure, shape, dtype and device of those to come; none of them is kept yet.
        y: targets (n, ...), likewise; None where there are none.
        pad: what shorter examples are padded with; None: all have the same shape.

    Attributes:
        stamp: another number whenever the examples are others, or elsewhere; no two buffers have the same.
    """

    def __init__(self, capacity: int, x: Nest, y: Nest, pad: Pad = None) -> None:
        self.capacity = capacity
        self.x = batches.empty(x, 0)
        self.y = batches.empty(y, 0)
        self.count = 0
        self.stamp = next(_stamps)
        self._room = 0
        self._pad = pad

    def __len__(self) -> int:
        return self.count

    def examples(self) -> tuple[Nest, Nest]:
        """Views of the kept examples."""
        if self.count == self._room:
            return self.x, self.y  # the same objects every time: an engine need not compare storages
        kept = slice(self.count)
        return batches.select(self.x, kept), batches.select(self.y, kept)

    @abc.abstractmethod
    def add(self, x: Nest, y: Nest) -> None:
        """Sees a mini-batch that `check_batch` has let pass."""

    @abc.abstractmethod
    def shrink(self, capacity: int) -> None:
        """Evicts examples for good until the new capacity is enough; does nothing where it is not smaller."""

    def end_task(self) -> None:  # noqa: B027 - most policies have nothing to do
        """Another task has begun."""

    def state_dict(self) -> dict[str, Any]:
        """Copies of the examples, and whatever else decides which ones are kept from here on."""
        x, y = self.examples()
        return {"x": as_state(x), "y": batches.clone(y)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Args:
            state: with an x and a y of the same shape, dtype and device as those given to the constructor.

        Raises:
            ValueError: the state is not one of such a buffer.
        """
        n = batches.size_of(state["x"])
        check_count("the number of a task's examples", n, 1, self.capacity)
        self.store(slice(0, n), state["x"], state["y"])
        self.count = n

    def check_batch(self, x: Nest, y: Nest) -> None:
        """Raises unless a mini-batch has the structure, shape, dtype and device of those that came before."""
        for name, kept, new in (("x", self.x, x), ("y", self.y, y)):
            batches.fit(name, kept, new, self._pad, "the task's earlier examples")

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Moves the examples, and converts those with a floating-point dtype."""
        self.stamp = next(_stamps)
        self.x, self.y = batches.moved(self.x, device, dtype), batches.moved(self.y, device, dtype)

    def store(self, slots: slice | Tensor, x: Nest, y: Nest) -> None:
        """Writes copies into slots, new ones too; where there are none it writes nothing, so that `_version` stays.

        Args:
            slots: from a start to a stop, or positions (n,).
            x: n inputs, right-padded here where they, or those kept, are shorter.
            y: n targets, likewise.
        """
        if not batches.size_of(x):
            return
        self.stamp = next(_stamps)
        self._make_room(int(slots.max()) + 1 if isinstance(slots, Tensor) else slots.stop)
        if self._pad is not None:
            x, y = batches.padded_to("x", x, [self.x], self._pad), batches.padded_to("y", y, [self.y], self._pad)
            self.x = batches.padded_to("x", self.x, [x], self._pad)
            self.y = batches.padded_to("y", self.y, [y], self._pad)
        if isinstance(x, Objects):
            with torch.no_grad():
                x = batches.clone(x)
        batches.write(self.x, slots, x)
        batches.write(self.y, slots, y)

    def resize(self, capacity: int, keep: Tensor) -> None:
        """Changes the capacity, and keeps the examples in the slots `keep` (n,), n <= capacity, in that order."""
        self.stamp = next(_stamps)
        self.x, self.y = batches.select(self.x, keep), batches.select(self.y, keep)
        self.capacity, self.count, self._room = capacity, len(keep), len(keep)

    def _make_room(self, n: int) -> None:
        if n <= self._room:
            return
        kept = slice(0, self.count)
        x, y = batches.select(self.x, kept), batches.select(self.y, kept)
        self._room = min(self.capacity, max(n, 2 * self._room))
        self.x, self.y = batches.empty(self.x, self._room), batches.empty(self.y, self._room)
        batches.write(self.x, kept, x)
        batches.write(self.y, kept, y)


def as_state(x: Nest) -> Nest:
    """Copies of the inputs, as states hold them: objects as a list."""
    copies = batches.clone(x)
    return copies.items if isinstance(copies, Objects) else copies
