"""What all streams have in common: tasks with training examples, and mini-batches of them."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """One task of a stream."""

    images: Tensor  # (n, ...), uint8: the training examples as the task shows them, in a random order
    labels: Tensor  # (n,), int64, counted from 0 within `outputs`
    outputs: range  # the outputs of the model that are the task's classes
    descriptor: Tensor | None = field(default=None, kw_only=True)  # what the model is told about the task, float32


@dataclass(frozen=True)
class Stream(abc.ABC):
    """Tasks, numbered in the order in which they are learned."""

    tasks: Sequence[Task]
    n_outputs: int  # of a model for all tasks
    data: str  # the name of the data set
    architecture: Literal["mlp", "resnet18"]  # the network of the paper for such inputs

    @property
    def n_tasks(self) -> int:
        """The number of tasks T."""
        return len(self.tasks)

    @property
    def outputs(self) -> tuple[range, ...]:
        """For each task the outputs of the model that are its classes; labels count from 0 within them."""
        return tuple(task.outputs for task in self.tasks)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.tasks[0].images.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tasks[0].images.device

    def in_order(self, order: Sequence[int]) -> Stream:
        """The same tasks numbered anew: the task that becomes number i is now number order[i]."""
        return replace(self, tasks=tuple(self.tasks[task] for task in order))

    def batches(
        self, task: int, batch_size: int, epochs: int, generator: torch.Generator, examples: range | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Mini-batches of a task's training examples, in a new random order, by a CPU generator, in every epoch.

        The last one of an epoch may be shorter. `examples` are the numbers of those to use, by default all. Yields x,
        shape (batch, ...), float32 in [0, 1], and y, shape (batch,), int64.
        """
        images, labels = self.tasks[task].images, self.tasks[task].labels
        examples = range(len(labels)) if examples is None else examples
        for _ in range(epochs):
            for index in torch.randperm(len(examples), generator=generator).split(batch_size):
                index = (index + examples.start).to(labels.device)
                yield to_unit(images[index]), labels[index]

    @abc.abstractmethod
    def test_batches(self, task: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The task's whole test set, in a fixed order; x and y as in `batches`."""

    def to(self, device: torch.device) -> Stream:
        """The same stream with all its tensors on `device`."""

        def moved(owner: Any) -> Any:
            return replace(owner, **{name: tensor.to(device) for name, tensor in _tensors(owner).items()})

        stream: Stream = replace(moved(self), tasks=tuple(map(moved, self.tasks)))
        return stream

    def tensors(self) -> Iterator[Tensor]:
        """All tensors in a fixed order, first those of the stream, then those of each task: they tell streams apart."""
        for owner in (self, *self.tasks):
            yield from _tensors(owner).values()


def to_unit(images: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1], which is all the normalisation of the published code."""
    return images.float().div_(255)


def _tensors(owner: Any) -> dict[str, Tensor]:
    """The tensors of a dataclass by name."""
    return {name: value for name, value in vars(owner).items() if isinstance(value, Tensor)}
