"""Streams of tasks made of one data set (section 5 of the paper): rotations and permutations of the pixels.

A task shows every image through one fixed map of pixels: each pixel of the task's image is some pixel of the original
one, or blank. A nearest-neighbour rotation and a permutation are both such maps. So a task keeps its map and its own
training examples, and all tasks share one copy of the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gem_fast.paper.data import ImageData
from gem_fast.paper.errors import InputError, extra

__all__ = ["STREAMS", "Stream", "Task", "permutations", "rotation_map", "rotations"]


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        images: Shape (n, pixels), uint8: the training examples, already seen through `pixel_map`.
        labels: Shape (n,), int64.
        pixel_map: Shape (pixels,), int64: which pixel of the original each pixel of this task shows; the number
            `pixels`, one past the last, stands for a blank pixel.
    """

    images: Tensor
    labels: Tensor
    pixel_map: Tensor


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learned, with the test set they share.

    Attributes:
        tasks: The T tasks.
        test_images: Shape (m, pixels + 1), float32 in [0, 1]: the original test images and one blank pixel.
        test_labels: Shape (m,), int64.
        n_outputs: The number of classes.
    """

    tasks: tuple[Task, ...]
    test_images: Tensor
    test_labels: Tensor
    n_outputs: int

    @property
    def n_inputs(self) -> int:
        """The number of pixels of an image."""
        return self.test_images.shape[1] - 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an example."""
        return (self.n_inputs,)

    @property
    def outputs(self) -> tuple[range, ...]:
        """The outputs that are each task's classes: all of them."""
        return (range(self.n_outputs),) * len(self.tasks)

    def to(self, device: torch.device) -> Stream:
        """The same stream with all its tensors on `device`."""
        tasks = tuple(
            Task(task.images.to(device), task.labels.to(device), task.pixel_map.to(device)) for task in self.tasks
        )
        return replace(
            self, tasks=tasks, test_images=self.test_images.to(device), test_labels=self.test_labels.to(device)
        )

    def batches(
        self, task: int, batch_size: int, epochs: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Mini-batches of a task's training examples, in a new random order in every epoch.

        Args:
            task: Number of the task, 0 ... T - 1.
            batch_size: Examples per mini-batch; the last one of an epoch may be shorter.
            epochs: Passes over the task's examples.
            generator: A CPU generator, source of the order.

        Yields:
            x, shape (batch, pixels), float32 in [0, 1], and y, shape (batch,), int64.
        """
        examples = self.tasks[task]
        for _ in range(epochs):
            for index in torch.randperm(len(examples.labels), generator=generator).split(batch_size):
                index = index.to(examples.labels.device)
                yield _to_unit(examples.images[index]), examples.labels[index]

    def test_batches(self, task: int, batch_size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole test set as the task shows it, in a fixed order; x and y as in `batches`."""
        pixel_map = self.tasks[task].pixel_map
        for images, labels in zip(self.test_images.split(batch_size), self.test_labels.split(batch_size), strict=True):
            yield images.index_select(1, pixel_map), labels


def rotations(data: ImageData, n_tasks: int, samples_per_task: int, generator: torch.Generator) -> Stream:
    """Each task rotates the images by an angle of its own.

    The angle of task k is uniform in its slice [k, k + 1) * 180 / T degrees; pixels are taken from the nearest
    neighbour, and those from outside of the image are blank.

    Args:
        data: The data set.
        n_tasks: The number of tasks T >= 1.
        samples_per_task: Training examples of each task, drawn without replacement for each task anew.
        generator: A CPU generator, source of the angles and the examples.

    Returns:
        The stream, on the CPU.

    Raises:
        InputError: More examples are asked for than there are, or Pillow is missing.
    """
    height, width = data.test_images.shape[1:]

    def pixel_map(task: int) -> Tensor:
        angle = (task + torch.rand((), generator=generator, dtype=torch.float64).item()) * 180 / n_tasks
        return rotation_map(height, width, angle)

    return _stream(data, n_tasks, samples_per_task, generator, pixel_map)


def rotation_map(height: int, width: int, angle: float) -> Tensor:
    """The map of pixels that rotates an image about its centre, as Pillow does.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        angle: Degrees counter-clockwise.

    Returns:
        Shape (height * width,), int64, as Task.pixel_map.

    Raises:
        InputError: Pillow is missing.
    """
    with extra("the stream rotations"):
        from PIL import Image
    n_pixels = height * width
    # Rotate an image of the pixels' numbers, counted from 1 because Pillow fills what comes from outside with 0.
    numbers = Image.fromarray(np.arange(1, n_pixels + 1, dtype=np.int32).reshape(height, width))
    source = torch.from_numpy(np.array(numbers.rotate(angle))).flatten().long() - 1
    return source.masked_fill(source < 0, n_pixels)


def permutations(data: ImageData, n_tasks: int, samples_per_task: int, generator: torch.Generator) -> Stream:
    """Each task permutes the pixels by a random permutation of its own; arguments, result and errors as rotations."""
    n_pixels = data.test_images[0].numel()

    def pixel_map(task: int) -> Tensor:
        return torch.randperm(n_pixels, generator=generator)

    return _stream(data, n_tasks, samples_per_task, generator, pixel_map)


STREAMS: dict[str, Callable[[ImageData, int, int, torch.Generator], Stream]] = {
    "rotations": rotations,
    "permutations": permutations,
}


def _stream(
    data: ImageData,
    n_tasks: int,
    samples_per_task: int,
    generator: torch.Generator,
    pixel_map: Callable[[int], Tensor],
) -> Stream:
    n_train = len(data.train_labels)
    if samples_per_task > n_train:
        raise InputError(
            f"--samples-per-task must be at most {n_train}, the training examples of {data.name}, "
            f"got {samples_per_task}"
        )

    def make_task(task: int) -> Task:
        pixels = pixel_map(task)
        sample = torch.randperm(n_train, generator=generator)[:samples_per_task]
        images = _with_blank(data.train_images[sample])[:, pixels]
        return Task(images, data.train_labels[sample], pixels)

    tasks = tuple(make_task(task) for task in range(n_tasks))
    return Stream(tasks, _to_unit(_with_blank(data.test_images)), data.test_labels, data.n_outputs)


def _with_blank(images: Tensor) -> Tensor:
    return torch.nn.functional.pad(images.flatten(1), (0, 1))


def _to_unit(images: Tensor) -> Tensor:
    return images.float().div_(255)
