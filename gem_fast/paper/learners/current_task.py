"""The examples of the task that is being learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gem_fast.memory import check_examples
from gem_fast.state import check_count, check_keys, check_plain_tensor


class CurrentTaskBuffer:
    """Keeps the first examples of the current task; they are evicted when another task begins.

    Attributes:
        task: The current task; None before the first example.
    """

    def __init__(self, n_tasks: int, capacity: int | None = None) -> None:
        """Begins without a task; at most `capacity` examples are kept, None keeps all of them."""
        self.task: int | None = None
        self._n_tasks = n_tasks
        self._capacity = capacity
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._count = 0

    def ends_with(self, task: int) -> bool:
        """Whether an example of `task` ends the current task."""
        return self.task is not None and task != self.task

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Sees one mini-batch of a task, the current one or a new one."""
        if task != self.task:
            self.task, self._batches, self._count = task, [], 0
        free = len(y) if self._capacity is None else min(len(y), self._capacity - self._count)
        if free:
            self._batches.append((x[:free].clone(), y[:free].clone()))
            self._count += free

    def examples(self) -> tuple[Tensor, Tensor]:
        """The examples kept, x (n, ...) and y (n,), in the order in which they came; there is a current task."""
        x, y = zip(*self._batches, strict=True)
        return torch.cat(x), torch.cat(y)

    def state_dict(self) -> dict[str, Any]:
        """The current task and its examples."""
        return {"task": self.task, "examples": list(self.examples()) if self._batches else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state that `state_dict` returned; raises ValueError for another, and is then as it was."""
        check_keys("current_task", state, ("task", "examples"))
        task, examples = state["task"], state["examples"]
        if not isinstance(examples, list) or len(examples) != (0 if task is None else 2):
            raise ValueError(
                "the current task's examples must be inputs and labels, or none without a task, got others"
            )
        batches: list[tuple[Tensor, Tensor]] = []
        if task is not None:
            check_count("the current task", task, 0, self._n_tasks - 1)
            for name, value in zip("xy", examples, strict=True):
                check_plain_tensor(name, value)
            check_examples(*examples)
            x, y = examples
            if y.dtype != torch.int64 or y.dim() != 1:
                raise ValueError(f"y must have shape (n,), int64, got {tuple(y.shape)}, {y.dtype}")
            if self._capacity is not None and len(y) > self._capacity:
                raise ValueError(f"the current task must have at most {self._capacity} examples, got {len(y)}")
            batches.append((x.clone(), y.clone()))
        self.task, self._batches, self._count = task, batches, sum(len(y) for _, y in batches)
