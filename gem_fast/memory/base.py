"""What all policies have in common: the tasks, the share of each in the budget, the state."""

import abc
from collections.abc import Hashable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from gem_fast.memory.buffer import ExampleBuffer
from gem_fast.memory.checks import check_classes, check_examples, check_size, check_task
from gem_fast.state import check_keys, check_plain_task, check_plain_tensor

M = TypeVar("M", bound="PolicyMemory")


class PolicyMemory(abc.ABC):
    """A memory that keeps up to m examples of each task; which ones is the policy of a subclass.

    Args:
        per_task: m, the number of examples kept per task: `n_memories` of the published code, `patterns_per_experience`
            of Avalanche's GEM and A-GEM.
        total: a budget of examples for all tasks instead, m = total // (tasks seen so far): `mem_size` of Avalanche's
            replay. The memories of old tasks shrink as new tasks come.

    Raises:
        ValueError: both or neither are given, or a size is not a positive number.
        TypeError: a size is not an integer.
    """

    # What the state of a task holds beside its id and its examples.
    state_keys: ClassVar[tuple[str, ...]]
    # Whether targets must be classes.
    needs_classes: ClassVar[bool] = False

    def __init__(self, per_task: int | None = None, *, total: int | None = None) -> None:
        if (per_task is None) == (total is None):
            raise ValueError(f"exactly one of per_task and total must be given, got per_task={per_task}, total={total}")
        for name, size in (("per_task", per_task), ("total", total)):
            if size is not None:
                check_size(name, size)
        self.per_task = per_task
        self.total = total
        self._buffers: dict[Hashable, ExampleBuffer] = {}
        self._current: ExampleBuffer | None = None  # of the task observed last; the others have seen their task end

    @abc.abstractmethod
    def _new_buffer(self, capacity: int, x: Tensor, y: Tensor) -> ExampleBuffer:
        """An empty buffer for a new task, whose examples have the shape, dtype and device of x and y."""

    def _check(self, x: Tensor, y: Tensor) -> None:
        """Raises unless the policy can keep such examples."""
        check_examples(x, y)
        if self.needs_classes:
            check_classes(y)

    @property
    def tasks(self) -> list[Hashable]:
        """The tasks seen so far, in the order in which they first came."""
        return list(self._buffers)

    def __len__(self) -> int:
        """The number of examples kept, over all tasks."""
        return sum(map(len, self._buffers.values()))

    def __repr__(self) -> str:
        size = f"per_task={self.per_task}" if self.total is None else f"total={self.total}"
        return f"{type(self).__name__}({size}): {len(self)} examples of {len(self._buffers)} tasks"

    def observe(self, x: Tensor, y: Tensor, task: Hashable) -> None:
        """Sees a mini-batch, and keeps copies of those examples that the policy wants.

        Args:
            x: (n, ...) inputs; every mini-batch of a task has the same shape beyond n, dtype and device.
            y: (n, ...) targets, likewise.
            task: any hashable id: a number, a string, a tuple of these.

        Raises:
            TypeError: x or y is not a dense tensor, or the id cannot be hashed or is a tensor.
            ValueError: x and y differ in length, are empty, do not fit what the task has kept or are not what the
                policy needs, or `total` is too small for another task. The memory is then as it was.
        """
        self._check(x, y)
        check_task(task)
        buffer = self._buffers.get(task)
        capacity = self._capacity(len(self._buffers) + (buffer is None))
        if buffer is None:
            buffer = self._new_buffer(capacity, x, y)
        else:
            buffer.check_batch(x, y)
        if buffer is not self._current:
            for other in self._buffers.values():
                if other is not buffer:
                    other.end_task()
                    other.shrink(capacity)
            self._current = buffer
        self._buffers[task] = buffer
        buffer.add(x.detach(), y.detach())

    def examples(self, task: Hashable) -> tuple[Tensor, Tensor]:
        """The kept examples of `task`: views x (m', ...) and y (m', ...) with m' <= m, not to be written to.

        As long as they are the same examples they are in the same storage, with the same `_version`.

        Raises:
            KeyError: the task has not been seen.
        """
        if task not in self._buffers:
            raise KeyError(f"task must be one that was observed, got {task!r}")
        return self._buffers[task].examples()

    def to(self: M, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> M:
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
        for buffer in self._buffers.values():
            buffer.to(device, dtype)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Copies of the examples and the sizes: tensors and plain Python values, for torch.load(weights_only=True).

        Raises:
            ValueError: a task's id is not a number, a string, None or a tuple of these: no such file could hold it.
        """
        for task in self._buffers:
            check_plain_task("task", task)
        return {
            "per_task": self.per_task,
            "total": self.total,
            "tasks": [{"task": task, **buffer.state_dict()} for task, buffer in self._buffers.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state that `state_dict` returned, as a copy.

        Raises:
            ValueError: the state is not one of a memory, or of one of another size or policy. The memory is then as it
                was.
        """
        check_keys("state", state, ("per_task", "total", "tasks"))
        for name, mine in (("per_task", self.per_task), ("total", self.total)):
            if type(state[name]) is not type(mine) or state[name] != mine:
                raise ValueError(f"state must be of a memory with {name} = {mine}, got {state[name]!r:.50}")
        if not isinstance(state["tasks"], list):
            raise ValueError(f"tasks of the state must be a list, got {type(state['tasks']).__name__}")
        capacity = self._capacity(max(1, len(state["tasks"])))
        buffers: dict[Hashable, ExampleBuffer] = {}
        for entry in state["tasks"]:
            check_keys("a task of the state", entry, ("task", "x", "y", *self.state_keys))
            task = entry["task"]
            check_plain_task("task", task)
            if task in buffers:
                raise ValueError(f"tasks of the state must differ, got {task!r:.50} twice")
            for name in ("x", "y"):
                check_plain_tensor(name, entry[name])
            self._check(entry["x"], entry["y"])
            buffers[task] = self._new_buffer(capacity, entry["x"], entry["y"])
            buffers[task].load_state_dict(entry)
        self._buffers, self._current = buffers, None

    def _capacity(self, tasks: int) -> int:
        """m, the share of each of so many tasks."""
        if self.total is None:
            assert self.per_task is not None
            return self.per_task
        if self.total < tasks:
            raise ValueError(f"total must be at least one example per task, got {self.total} for {tasks} tasks")
        return self.total // tasks
