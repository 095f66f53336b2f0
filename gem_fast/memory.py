"""Episodic memory: which examples of past tasks are kept (paper, Section 3)."""

from collections.abc import Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from gem_fast.state import check_count, check_keys, check_plain_task, check_plain_tensor


class Memory(Protocol):
    """What GEM asks of a memory; any policy that keeps to this can be used."""

    @property
    def tasks(self) -> list[Hashable]:
        """The tasks seen so far, in the order in which they first came."""

    def observe(self, x: Tensor, y: Tensor, task: Hashable) -> None:
        """Sees one mini-batch: x (n, ...) and y (n, ...) of `task`. Raises before it changes anything."""

    def examples(self, task: Hashable) -> tuple[Tensor, Tensor]:
        """The kept examples of `task`: x (m, ...) and y (m, ...), not to be written to."""

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on with the same examples."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state that `state_dict` returned."""


class EpisodicMemory:
    """The last m examples of each task: the paper's memory.

    Args:
        per_task: m, the number of examples kept per task.
        total: a budget of examples for all tasks instead: m = total // (tasks seen so far), so that the memories of old
            tasks shrink to their last m examples as new tasks come.

    Raises:
        ValueError: both or neither are given, or a size is not a positive number.
        TypeError: a size is not an integer.
    """

    def __init__(self, per_task: int | None = None, *, total: int | None = None) -> None:
        if (per_task is None) == (total is None):
            raise ValueError(f"exactly one of per_task and total must be given, got per_task={per_task}, total={total}")
        for name, size in (("per_task", per_task), ("total", total)):
            if size is None:
                continue
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} must be an integer, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1 example, got {size}")
        self.per_task = per_task
        self.total = total
        self._rings: dict[Hashable, _Ring] = {}

    @property
    def tasks(self) -> list[Hashable]:
        """The tasks seen so far, in the order in which they first came."""
        return list(self._rings)

    def __len__(self) -> int:
        """The number of examples kept, over all tasks."""
        return sum(ring.count for ring in self._rings.values())

    def __repr__(self) -> str:
        size = f"per_task={self.per_task}" if self.total is None else f"total={self.total}"
        return f"EpisodicMemory({size}): {len(self)} examples of {len(self._rings)} tasks"

    def observe(self, x: Tensor, y: Tensor, task: Hashable) -> None:
        """Keeps copies of the last examples of a mini-batch, in place of the task's oldest ones.

        Args:
            x: (n, ...) inputs; every mini-batch of a task has the same shape beyond n, dtype and device.
            y: (n, ...) targets, likewise.
            task: any hashable id: a number, a string, a tuple of these.

        Raises:
            TypeError: x or y is not a dense tensor, or the id cannot be hashed or is a tensor.
            ValueError: x and y differ in length, are empty or do not fit what the task has kept, or `total` is too
                small for another task. The memory is then as it was.
        """
        check_examples(x, y)
        check_task(task)
        ring = self._rings.get(task)
        if ring is not None:
            ring.check(x, y)
        else:
            size = self._size(len(self._rings) + 1)
            ring = _Ring(size, x, y)
            for other in self._rings.values():
                other.shrink(size)
            self._rings[task] = ring
        ring.write(x, y)

    def examples(self, task: Hashable) -> tuple[Tensor, Tensor]:
        """The kept examples of `task`: views x (m', ...) and y (m', ...) with m' <= m, not to be written to.

        Raises:
            KeyError: the task has not been seen.
        """
        if task not in self._rings:
            raise KeyError(f"task must be one that was observed, got {task!r}")
        ring = self._rings[task]
        return ring.x[: ring.count], ring.y[: ring.count]

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "EpisodicMemory":
        """Follows a model that was moved or converted after the first examples came.

        Args:
            device: where the examples go; None leaves them where they are.
            dtype: a floating-point dtype that inputs and targets with one take; None leaves them as they are.

        Returns:
            The memory itself.

        Raises:
            TypeError: dtype is not a floating-point one.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point one, got {dtype}")
        for ring in self._rings.values():
            ring.x, ring.y = (
                kept.to(device=device, dtype=dtype if kept.is_floating_point() else None) for kept in (ring.x, ring.y)
            )
        return self

    def state_dict(self) -> dict[str, Any]:
        """Copies of the examples and the sizes: tensors and plain Python values, for torch.load(weights_only=True).

        Raises:
            ValueError: a task's id is not a number, a string, None or a tuple of these: no such file could hold it.
        """
        for task in self._rings:
            check_plain_task("task", task)
        return {
            "per_task": self.per_task,
            "total": self.total,
            "tasks": [
                {"task": task, "x": ring.x[: ring.count].clone(), "y": ring.y[: ring.count].clone(), "next": ring.next}
                for task, ring in self._rings.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state that `state_dict` returned, as a copy.

        Raises:
            ValueError: the state is not one of a memory, or of one of another size. The memory is then as it was.
        """
        check_keys("state", state, ("per_task", "total", "tasks"))
        for name, mine in (("per_task", self.per_task), ("total", self.total)):
            if type(state[name]) is not type(mine) or state[name] != mine:
                raise ValueError(f"state must be of a memory with {name} = {mine}, got {state[name]!r:.50}")
        if not isinstance(state["tasks"], list):
            raise ValueError(f"tasks of the state must be a list, got {type(state['tasks']).__name__}")
        size = self._size(max(1, len(state["tasks"])))
        rings: dict[Hashable, _Ring] = {}
        for entry in state["tasks"]:
            check_keys("a task of the state", entry, ("task", "x", "y", "next"))
            task = entry["task"]
            check_plain_task("task", task)
            if task in rings:
                raise ValueError(f"tasks of the state must differ, got {task!r:.50} twice")
            rings[task] = _Ring.of_state(size, entry["x"], entry["y"], entry["next"])
        self._rings = rings

    def _size(self, tasks: int) -> int:
        if self.total is None:
            assert self.per_task is not None
            return self.per_task
        if self.total < tasks:
            raise ValueError(f"total must be at least one example per task, got {self.total} for {tasks} tasks")
        return self.total // tasks


def check_examples(x: Tensor, y: Tensor) -> None:
    """Raises unless x and y are dense tensors with the same, positive number of examples."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got a sparse one of layout {value.layout}")
        if value.dim() == 0 or len(value) == 0:
            raise ValueError(f"{name} must hold at least one example, got shape {tuple(value.shape)}")
    if len(x) != len(y):
        raise ValueError(f"x and y must have the same number of examples, got {len(x)} and {len(y)}")


def check_task(task: Hashable) -> None:
    """Raises unless `task` can serve as an id. Tensors hash by identity: equal ones would be different tasks."""
    if isinstance(task, Tensor):
        raise TypeError("task must be a hashable id such as an int or a string, got a tensor; use task.item()")
    try:
        hash(task)
    except TypeError:
        raise TypeError(f"task must be a hashable id such as an int or a string, got {type(task).__name__}") from None


class _Ring:
    """The last `size` examples of one task, in buffers of that size."""

    def __init__(self, size: int, x: Tensor, y: Tensor) -> None:
        self.x = x.new_empty((size, *x.shape[1:]))
        self.y = y.new_empty((size, *y.shape[1:]))
        self.count = 0
        self.next = 0

    @classmethod
    def of_state(cls, size: int, x: Any, y: Any, next: Any) -> "_Ring":
        for name, value in (("x", x), ("y", y)):
            check_plain_tensor(name, value)
        check_examples(x, y)
        check_count("the number of a task's examples", len(x), 1, size)
        # A ring that is not full yet has been written from its start.
        least, most = (0, size - 1) if len(x) == size else (len(x), len(x))
        check_count("next", next, least, most)
        ring = cls(size, x, y)
        ring.write(x, y)
        ring.next = next
        return ring

    def check(self, x: Tensor, y: Tensor) -> None:
        for name, new, kept in (("x", x, self.x), ("y", y, self.y)):
            mine = (tuple(kept.shape[1:]), kept.dtype, kept.device)
            theirs = (tuple(new.shape[1:]), new.dtype, new.device)
            if mine != theirs:
                raise ValueError(
                    f"{name} must have the shape, dtype and device of the task's earlier examples, "
                    f"{_describe(*mine)}, got {_describe(*theirs)}"
                )

    def write(self, x: Tensor, y: Tensor) -> None:
        size = len(self.x)
        x, y = x.detach()[-size:], y.detach()[-size:]
        first = min(len(x), size - self.next)
        for kept, new in ((self.x, x), (self.y, y)):
            kept[self.next : self.next + first] = new[:first]
            kept[: len(x) - first] = new[first:]
        self.next = (self.next + len(x)) % size
        self.count = min(self.count + len(x), size)

    def shrink(self, size: int) -> None:
        if size >= len(self.x):
            return
        keep = min(size, self.count)
        last = torch.arange(self.next - keep, self.next, device=self.x.device) % len(self.x)
        x, y = self.x[last], self.y[last.to(self.y.device)]
        self.x, self.y = self.x.new_empty((size, *x.shape[1:])), self.y.new_empty((size, *y.shape[1:]))
        self.count = self.next = 0
        self.write(x, y)


def _describe(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"(n{''.join(f', {size}' for size in shape)}) {dtype} on {device}"
