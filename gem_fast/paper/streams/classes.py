"""Streams that deal out the classes of one data set: each task has a set of classes to itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gem_fast.paper.data import ImageData, check_grey
from gem_fast.paper.data.cifar import IMAGE_SHAPE, N_CLASSES
from gem_fast.paper.errors import InputError
from gem_fast.paper.streams.base import Stream, Task, to_unit

# Test images that are answered at once. With 500 of them the activations of a ResNet18 are so large that the C library
# gives each back to the system and asks for it anew, which doubles the time.
TEST_BATCH = 125


@dataclass(frozen=True)
class ClassTask(Task):
    """A task with its part of the test set."""

    test_images: Tensor  # (m, ...), uint8
    test_labels: Tensor  # (m,), int64, counted like `labels`
    classes: tuple[int, ...]  # their labels in the data set, in the order of the task's outputs


@dataclass(frozen=True)
class ClassStream(Stream):
    """Tasks with disjoint sets of classes."""

    tasks: Sequence[ClassTask]

    def test_batches(self, task: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test examples of the task's classes, in a fixed order; x and y as in `batches`."""
        images, labels = self.tasks[task].test_images, self.tasks[task].test_labels
        for x, y in zip(images.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True):
            yield to_unit(x), y


def cifar100(
    data: ImageData,
    n_tasks: int = 20,
    samples_per_task: int | None = None,
    generator: torch.Generator | None = None,
    *,
    class_order: Literal["natural", "random"] = "natural",
) -> ClassStream:
    """Incremental CIFAR-100, on the CPU: disjoint sets of its classes, with one slice of the outputs per task.

    20 tasks have 5 classes and 2500 training examples each; `samples_per_task` of them are drawn without replacement,
    None takes all. With the class order "natural", as published, task 0 has the classes 0 ... 4, and so on; "random"
    draws it. The CPU generator, by default one with seed 0, is the source of the examples and of the order.

    Raises InputError where the data are not like CIFAR-100, there are fewer classes than tasks or fewer examples than
    asked for, or no test examples of a task.
    """
    if data.train_images.shape[1:] != IMAGE_SHAPE or data.n_outputs > N_CLASSES:
        raise InputError(
            f"--data must be CIFAR-100 for the stream cifar100 (its name, folder or .tar.gz), got {data.name}"
        )
    return _deal_out(data, n_tasks, samples_per_task, generator, class_order, "task", "resnet18")


def split(
    data: ImageData,
    n_tasks: int = 5,
    samples_per_task: int | None = None,
    generator: torch.Generator | None = None,
    *,
    class_order: Literal["natural", "random"] = "natural",
    head: Literal["task", "shared"] = "task",
) -> ClassStream:
    """Disjoint sets of the classes of grey images of shape (pixels,), as `cifar100`; 5 tasks of ten digits have 2 each.

    With head "task", each has one slice of the outputs, so that its number helps to answer; with "shared" every task is
    answered with all outputs, without its number (class-incremental learning).
    """
    check_grey(data, "split")
    flat = replace(data, train_images=data.train_images.flatten(1), test_images=data.test_images.flatten(1))
    return _deal_out(flat, n_tasks, samples_per_task, generator, class_order, head, "mlp")


def _deal_out(
    data: ImageData,
    n_tasks: int,
    samples_per_task: int | None,
    generator: torch.Generator | None,
    class_order: str,
    head: str,
    architecture: Literal["mlp", "resnet18"],
) -> ClassStream:
    """Makes a stream; where T does not divide the number of classes, the first tasks have one class more."""
    generator = generator or torch.Generator().manual_seed(0)
    classes = data.train_labels.unique()  # sorted; some data sets leave numbers out
    if n_tasks > len(classes):
        raise InputError(f"--tasks must be at most {len(classes)}, the classes of {data.name}, got {n_tasks}")
    if class_order == "random":
        classes = classes[torch.randperm(len(classes), generator=generator)]
    shared = range(len(classes)) if head == "shared" else None
    tasks: list[ClassTask] = []
    for own in classes.tensor_split(n_tasks):
        first = sum(len(task.classes) for task in tasks)
        outputs = range(first, first + len(own))
        train = torch.isin(data.train_labels, own).nonzero().flatten()
        train = train[torch.randperm(len(train), generator=generator)]
        test = torch.isin(data.test_labels, own).nonzero().flatten()
        if len(test) == 0:
            raise InputError(f"{data.name} must have test examples of every task's classes, got none of {own.tolist()}")
        if samples_per_task is not None and samples_per_task > len(train):
            raise InputError(
                f"--samples-per-task must be at most {len(train)}, the training examples of task {len(tasks) + 1} of "
                f"the classes of {data.name}, got {samples_per_task}"
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
