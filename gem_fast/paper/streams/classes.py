"""Streams that deal out the classes of one data set: each task has a set of classes to itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gem_fast.paper.data import ImageData
from gem_fast.paper.errors import InputError
from gem_fast.paper.streams.base import Stream, Task, to_unit

__all__ = ["ClassStream", "ClassTask", "make_class_stream"]

# Test images that are answered at once. With 500 of them the activations of a ResNet18 are so large that the C library
# gives each back to the system and asks for it anew, which doubles the time.
TEST_BATCH = 125


@dataclass(frozen=True)
class ClassTask(Task):
    """A task with its part of the test set.

    Attributes:
        test_images: Shape (m, ...), uint8.
        test_labels: Shape (m,), int64, counted like `labels`.
        classes: The labels in the data set of the task's classes, in the order of their outputs.
    """

    test_images: Tensor
    test_labels: Tensor
    classes: tuple[int, ...]


@dataclass(frozen=True)
class ClassStream(Stream):
    """Tasks with disjoint sets of classes."""

    tasks: Sequence[ClassTask]

    def test_batches(self, task: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test examples of the task's classes, in a fixed order; x and y as in `batches`."""
        images, labels = self.tasks[task].test_images, self.tasks[task].test_labels
        for x, y in zip(images.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True):
            yield to_unit(x), y


def make_class_stream(
    data: ImageData,
    n_tasks: int,
    samples_per_task: int | None,
    generator: torch.Generator,
    *,
    architecture: Literal["mlp", "resnet18"],
    class_order: Literal["natural", "random"] = "natural",
    head: Literal["task", "shared"] = "task",
) -> ClassStream:
    """Makes a stream.

    Args:
        data: The data set.
        n_tasks: The number of tasks T >= 1; where it does not divide the number of classes, the first tasks have one
            class more.
        samples_per_task: Training examples of each task, drawn without replacement; None takes all.
        generator: A CPU generator, source of the examples and of the order of classes.
        architecture: As Stream.architecture.
        class_order: "natural": the first classes are the first task's; "random": drawn.
        head: "task": each task's classes are its own outputs, and labels count within them; "shared": every task is
            answered with all outputs, so the model has to find out the task as well (class-incremental learning).

    Returns:
        The stream, on the CPU.

    Raises:
        InputError: There are fewer classes than tasks, fewer examples than asked for, or no test examples of a task.
    """
    classes = data.train_labels.unique()  # sorted; some data sets leave numbers out
    if n_tasks > len(classes):
        raise InputError(f"--tasks must be at most {len(classes)}, the classes of {data.name}, got {n_tasks}")
    if class_order == "random":
        classes = classes[torch.randperm(len(classes), generator=generator)]
    shared = range(len(classes)) if head == "shared" else None
    tasks = []
    first = 0
    for number, own in enumerate(classes.tensor_split(n_tasks)):
        outputs = range(first, first + len(own))
        first = outputs.stop
        train = torch.isin(data.train_labels, own).nonzero().flatten()
        train = train[torch.randperm(len(train), generator=generator)]
        test = torch.isin(data.test_labels, own).nonzero().flatten()
        if len(test) == 0:
            raise InputError(f"{data.name} must have test examples of every task's classes, got none of {own.tolist()}")
        if samples_per_task is not None and samples_per_task > len(train):
            raise InputError(
                f"--samples-per-task must be at most {len(train)}, the training examples of task {number + 1} of the "
                f"classes of {data.name}, got {samples_per_task}"
            )
        sample = train[:samples_per_task]
        # class -> its number among the task's outputs: the label that the learner sees
        label = torch.zeros(data.n_outputs, dtype=torch.int64)
        label[own] = torch.arange(len(own)) + (outputs.start if shared else 0)
        tasks.append(
            ClassTask(
                images=data.train_images[sample],
                labels=label[data.train_labels[sample]],
                outputs=shared or outputs,
                test_images=data.test_images[test],
                test_labels=label[data.test_labels[test]],
                classes=tuple(own.tolist()),
            )
        )
    return ClassStream(tuple(tasks), len(classes), data.name, architecture)
