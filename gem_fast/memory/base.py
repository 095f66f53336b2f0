"""What all policies have in common: the tasks, the share of each in the budget, the state."""

import abc
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from gem_fast.batches import Pad, check_examples, check_pad, stored
from gem_fast.containers import Nest, Objects, leaves
from gem_fast.memory.buffer import ExampleBuffer
from gem_fast.memory.checks import check_classes, check_size, plain_task
from gem_fast.state import check_keys, check_plain_task, check_plain_tensor

M = TypeVar("M", bound="PolicyMemory")

Size: TypeAlias = int | Literal["all"]
"""A number of examples, or all of them."""
Collate: TypeAlias = Callable[[list[Any]], Any]
"""collate_fn(list of examples) -> what the model takes, as a DataLoader's."""


class PolicyMemory(abc.ABC):
    """A memory that keeps up to m examples of each task; which ones is the policy of a subclass.

    Args:
        per_task: m, the number of examples kept per task: `n_memories` of the published code, `patterns_per_experience`
            of Avalanche's GEM and A-GEM; "all" keeps every example. The memory takes up what its examples need.
        total: a budget of examples for all tasks instead, m = total // (tasks seen so far): `mem_size` of Avalanche's
            replay. The memories of old tasks shrink as new tasks come.
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

    # What the state of a task holds beside its id and its examples.
    state_keys: ClassVar[tuple[str, ...]]
    # Whether targets must be classes.
    needs_classes: ClassVar[bool] = False

    def __init__(
        self,
        per_task: Size | None = None,
        *,
        total: int | None = None,
        pad: Pad = None,
        collate_fn: Collate | None = None,
    ) -> None:
        if (per_task is None) == (total is None):
            raise ValueError(f"exactly one of per_task and total must be given, got per_task={per_task}, total={total}")
        for name, size in (("per_task", per_task), ("total", total)):
            if size is not None and (name, size) != ("per_task", "all"):
                check_size(name, size)
        check_pad(pad)
        self.per_task = per_task
        self.total = total
        self.pad = pad
        self.collate_fn = collate_fn
        self._buffers: dict[Hashable, ExampleBuffer] = {}
        self._current: ExampleBuffer | None = None  # of the task observed last; the others have seen their task end

    @abc.abstractmethod
    def _new_buffer(self, capacity: int, x: Nest, y: Nest) -> ExampleBuffer:
        """An empty buffer for a new task, whose examples have the structure, shape, dtype and device of x and y."""

    def _stored(self, x: Any, y: Nest) -> tuple[Nest, Nest]:
        """Examples as they are kept; raises unless the policy can keep such ones."""
        if self.collate_fn is not None:
            if not isinstance(x, (list, tuple)):
                raise TypeError(f"x must be a list of examples, which collate_fn puts together, got {type(x).__name__}")
            x = Objects(list(x), self.collate_fn)
        check_examples(x, y)
        if self.needs_classes:
            check_classes(y)
        return stored(x), stored(y)

    @property
    def tasks(self) -> list[Hashable]:
        """The tasks seen so far, in the order in which they first came."""
        return list(self._buffers)

    def __len__(self) -> int:
        """The number of examples kept, over all tasks."""
        return sum(map(len, self._buffers.values()))

    def __repr__(self) -> str:
        size = f"per_task={self.per_task!r}" if self.total is None else f"total={self.total}"
        return f"{type(self).__name__}({size}): {len(self)} examples of {len(self._buffers)} tasks"

    def observe(self, x: Nest, y: Nest, task: Hashable) -> None:
        """Sees a mini-batch, and keeps copies of those examples that the policy wants.

        Args:
            x: (n, ...) inputs: a tensor, or any nest of dicts, tuples, lists and dataclasses with tensors in it, the
                first dimension of all of which runs over the same n examples; with `collate_fn` a list of examples.
                Every mini-batch of a task has the same structure, dtypes and devices, and the same shapes beyond n
                unless there is `pad`. A mapping that is no dataclass is kept as a dict.
            y: (n, ...) targets, likewise; or None where the loss needs only the output.
            task: any hashable id: a number, a string, a tuple of these. Those of NumPy are kept as Python's.

        Raises:
            TypeError: x or y holds something else than dense tensors, or the id cannot be hashed or is a tensor.
            ValueError: x and y differ in length, are empty, do not fit what the task has kept or are not what the
                policy needs, or `total` is too small for another task. The memory is then as it was.
        """
        if torch.is_inference_mode_enabled():
            # Copies made in it could not be written to outside of it.
            with torch.inference_mode(False):
                self.observe(x, y, task)
            return
        x, y = self._stored(x, y)
        task = plain_task(task)
        buffer = self._buffers.get(task)
        capacity = self._capacity(len(self._buffers) + (buffer is None))
        if buffer is None:
            buffer = self._new_buffer(capacity, x, y)
        else:
            buffer.check_batch(x, y)
        if buffer is not self._current:
            others = [other for other in self._buffers.values() if other is not buffer]
            for other in others:
                other.end_task()  # which may raise, before anything has changed
            for other in others:
                other.shrink(capacity)
            self._current = buffer
        self._buffers[task] = buffer
        buffer.add(x, y)

    @torch.inference_mode(False)
    @torch.no_grad()
    def examples(self, task: Hashable) -> tuple[Nest, Nest]:
        """The kept examples of `task`: views x (m', ...) and y (m', ...) with m' <= m, not to be written to.

        They have the structure that they were observed with; objects are a sequence (`gem_fast.containers.Objects`).

        As long as they are the same examples they are in the same storage, with the same `_version`.

        Raises:
            KeyError: the task has not been seen.
        """
        if task not in self._buffers:
            raise KeyError(f"task must be one that was observed, got {task!r}")
        return self._buffers[task].examples()

    def stamps(self, tasks: Sequence[Hashable]) -> list[int]:
        """One number per task: equal ones mean that `examples` returns what it did."""
        return [self._buffers[task].stamp for task in tasks]

    @torch.inference_mode(False)
    def to(self: M, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> M:
        """Follows a model that was moved or converted after the first examples came.

        Args:
            device: where the examples go; None leaves them where they are.
            dtype: a floating-point dtype that inputs and targets with one take; None leaves them as they are. Objects
                are moved by their own `to(device)`, where they have one, and not converted.

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

        Of other examples the state holds what they are: objects, dataclasses and named tuples, whose classes torch.load
        asks for (torch.serialization.add_safe_globals, or weights_only=False for a file that you trust).

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

    @torch.inference_mode(False)
    @torch.no_grad()
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
            for root in ("x", "y"):
                for name, leaf, _ in leaves(root, entry[root]):
                    if isinstance(leaf, Tensor):
                        check_plain_tensor(name, leaf)
            try:
                x, y = self._stored(entry["x"], entry["y"])
            except TypeError as error:
                raise ValueError(str(error)) from error
            buffers[task] = self._new_buffer(capacity, x, y)
            buffers[task].load_state_dict({**entry, "x": x, "y": y})
        self._buffers, self._current = buffers, None

    def _capacity(self, tasks: int) -> int:
        """m, the share of each of so many tasks."""
        if self.total is None:
            assert self.per_task is not None
            return sys.maxsize if self.per_task == "all" else self.per_task
        if self.total < tasks:
            raise ValueError(f"total must be at least one example per task, got {self.total} for {tasks} tasks")
        return self.total // tasks
