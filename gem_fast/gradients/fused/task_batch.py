"""Mini-batches that are made of several tasks' examples."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from gem_fast.batches import DoNotFit, concatenate, select, size_of
from gem_fast.containers import Nest
from gem_fast.gradients.fused.entries import SparseEntries
from gem_fast.gradients.interface import Batch


class Run(NamedTuple):
    """Tasks in a row that have equally many examples: one operator serves them all."""

    tasks: slice
    examples: slice
    size: int
    """The number of examples of each."""


class TaskSizes:
    """How many examples of a mini-batch are each task's; they lie one task after the other along its first dimension.

    Attributes:
        sizes: the number of examples of each task.
        total: N, their sum.
        equal: the number of examples where all tasks have the same, else None.
        order: in which order the tasks go through a module that keeps something of each: the current one, which is the
            last, before those of the past.
    """

    def __init__(self, sizes: list[int], *, with_current: bool = False) -> None:
        self.sizes = sizes
        last = len(sizes) - 1
        self.order = [last, *range(last)] if with_current else list(range(len(sizes)))
        self.total = sum(sizes)
        self.equal = sizes[0] if len(set(sizes)) == 1 else None

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def runs(self) -> list[Run]:
        """All tasks, in as few runs as there can be."""
        runs, task, example = [], 0, 0
        for size, group in groupby(self.sizes):
            count = len(list(group))
            runs.append(Run(slice(task, task + count), slice(example, example + count * size), size))
            task, example = task + count, example + count * size
        return runs

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, ...) as one view (n_k, ...) per task."""
        parts: tuple[Tensor, ...] = x.split(self.sizes)
        return parts

    def sum(self, x: Tensor, out: Tensor) -> None:
        """out[k] = the sum over task k's examples of x (N, ...); out is (t, ...)."""
        for tasks, examples, size in self.runs:
            torch.sum(x[examples].reshape(-1, size, *x.shape[1:]), 1, out=out[tasks])

    def repeat(self, per_task: Tensor) -> Tensor:
        """(t,) as (N,): each task's value for all of its examples."""
        if self.equal is not None:
            return per_task.unsqueeze(1).expand(-1, self.equal).flatten()
        # By sizes that the host knows: a tensor of them would have to be copied to a GPU.
        return torch.cat([value.expand(size) for value, size in zip(per_task, self.sizes, strict=True)])


class Inputs:
    """Inputs of some tasks, one task after the other.

    Attributes:
        parts: each task's (n_k, ...), or all of them (M, ...) as one.
    """

    def __init__(self, parts: Sequence[Nest]) -> None:
        self.parts = parts

    @cached_property
    def together(self) -> Nest:
        """(M, ...), made when first asked for: their non-zero entries may be all it takes."""
        return self.parts[0] if len(self.parts) == 1 else concatenate("x", self.parts)


@dataclass(frozen=True)
class TaskBatch:
    """What goes through the model in one forward.

    Attributes:
        inputs: of M examples.
        targets: (M, ...): of the same examples, or None.
        task: the model's argument `task`, where it takes one; the examples are then one task's.
        tasks: which examples are whose.
        plain_cross_entropy: whether the losses of all tasks can be one call, see `losses.is_plain_cross_entropy`.
        entries: the non-zero entries of `inputs`, where they are few.
        positions: (N,) int64: the examples of `inputs` that count; None for all of them.
        past: the same without the last task, where that is the current mini-batch.
        descriptor: the task's, where the examples are one task's; else (N, ...): each example has its task's.
    """

    inputs: Inputs
    targets: Nest
    task: Hashable
    tasks: TaskSizes
    plain_cross_entropy: bool = False
    entries: SparseEntries | None = None
    positions: Tensor | None = None
    past: TaskBatch | None = None
    descriptor: Nest = None

    @classmethod
    def of(cls, batch: Batch) -> TaskBatch:
        """One task's examples alone, for a call of their own."""
        return cls(Inputs([batch.x]), batch.y, batch.task, TaskSizes([batch.size]), descriptor=batch.descriptor)

    @cached_property
    def x(self) -> Nest:
        """(N, ...): the inputs. Of a sample they are copied when first asked for: its entries may be all it takes."""
        whole = self.inputs.together
        return whole if self.positions is None else select(whole, self.positions)

    @cached_property
    def y(self) -> Nest:
        """(N, ...): the targets, likewise."""
        return self.targets if self.positions is None else select(self.targets, self.positions)

    def with_current(self, x: Nest, y: Nest, descriptor: Nest) -> TaskBatch | None:
        """The same with the current mini-batch as one more task; None where they cannot be one batch as they are."""
        try:
            x, y = concatenate("x", [self.x, x]), concatenate("y", [self.y, y])
            descriptor = concatenate("descriptor", [self.descriptor, descriptor])
        except DoNotFit:
            return None
        sizes = [*self.tasks.sizes, size_of(x) - self.tasks.total]
        return TaskBatch(Inputs([x]), y, None, TaskSizes(sizes, with_current=True), past=self, descriptor=descriptor)

    def of_tasks(self, some: slice) -> TaskBatch:
        """The part that belongs to some of the tasks."""
        sizes = self.tasks.sizes[some]
        if len(sizes) == len(self.tasks):
            return self
        bounds = [0, *accumulate(self.tasks.sizes)]
        examples = slice(bounds[some.start], bounds[some.start] + sum(sizes))
        tasks, descriptor = TaskSizes(sizes), select(self.descriptor, examples)
        if self.positions is not None:
            return replace(self, tasks=tasks, descriptor=descriptor, positions=self.positions[examples])
        parts = self.inputs.parts
        inputs = Inputs([select(parts[0], examples)] if len(parts) == 1 else parts[some])
        targets, entries = select(self.targets, examples), self.entries and self.entries.of_tasks(some)
        return replace(self, inputs=inputs, targets=targets, tasks=tasks, descriptor=descriptor, entries=entries)
