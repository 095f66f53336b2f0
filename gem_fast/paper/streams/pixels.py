"""Streams that show one data set through a map of pixels for each task: rotations and permutations.

Each pixel of a task's image is some pixel of the original one, or blank: nearest-neighbour rotations and permutations
are both such maps. So a task keeps its map and its own training examples, and all tasks share one copy of the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gem_fast.paper.data import ImageData, check_grey
from gem_fast.paper.errors import InputError, extra
from gem_fast.paper.streams.base import Stream, Task, to_unit
from gem_fast.paper.streams.shown import Originals, ShownImages

# Test images that are answered at once: moving the weights is once for all of them.
TEST_BATCH = 10_000


@dataclass(frozen=True)
class PixelTask(Task):
    """A task with its map.

    Attributes:
        pixel_map: Shape (pixels,), int64: which pixel of the original each pixel of this task shows; the number
            `pixels`, one past the last, stands for a blank pixel. `images` are already seen through it.
        angle: The degrees by which the map turns images; 0 where it does something else.
    """

    pixel_map: Tensor
    angle: float = 0.0


@dataclass(frozen=True)
class PixelStream(Stream):
    """Tasks that share a test set and all outputs.

    Attributes:
        test_images: Shape (pixels + 1, m), float32 in [0, 1]: the original test images and one blank pixel, pixel by
            pixel.
        test_labels: Shape (m,), int64.
    """

    tasks: Sequence[PixelTask]
    test_images: Tensor
    test_labels: Tensor

    def test_batches(self, task: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole test set as the task shows it, in a fixed order; x, as `ShownImages`, and y as in `batches`."""
        for originals, labels in zip(self._originals, self.test_labels.split(TEST_BATCH), strict=True):
            yield ShownImages.of(originals, self.tasks[task].pixel_map), labels

    @cached_property
    def _originals(self) -> list[Originals]:
        """The test images of each batch."""
        return [Originals(images) for images in self.test_images.split(TEST_BATCH, dim=1)]


def rotations(data: ImageData, n_tasks: int, samples_per_task: int, generator: torch.Generator) -> PixelStream:
    """Each task rotates the images by an angle of its own.

    The angle of task k is uniform in its slice [k, k + 1) * 180 / T degrees; pixels are taken from the nearest
    neighbour, and those from outside of the image are blank.

    Args:
        data: The data set, of grey images.
        n_tasks: The number of tasks T >= 1.
        samples_per_task: Training examples of each task, drawn without replacement for each task anew.
        generator: A CPU generator, source of the angles, or permutations, and the examples.

    Returns:
        The stream, on the CPU.

    Raises:
        InputError: The images are in colour, more examples are asked for than there are, or Pillow is missing.
    """
    check_grey(data, "rotations")
    height, width = data.test_images.shape[1:]

    def turned(task: int) -> tuple[Tensor, float]:
        angle = (task + torch.rand((), generator=generator, dtype=torch.float64).item()) * 180 / n_tasks
        return rotation_map(height, width, angle), angle

    return _show(data, n_tasks, samples_per_task, generator, turned)


def permutations(data: ImageData, n_tasks: int, samples_per_task: int, generator: torch.Generator) -> PixelStream:
    """Each task permutes the pixels by a random permutation of its own; arguments, result and errors as `rotations`."""
    check_grey(data, "permutations")
    n_pixels = data.test_images[0].numel()

    def shuffled(task: int) -> tuple[Tensor, float]:
        return torch.randperm(n_pixels, generator=generator), 0.0

    return _show(data, n_tasks, samples_per_task, generator, shuffled)


def rotation_map(height: int, width: int, angle: float) -> Tensor:
    """The map of pixels that rotates an image about its centre, as Pillow does, by degrees counter-clockwise.

    Shape (height * width,), int64, as PixelTask.pixel_map; raises InputError where Pillow is missing.
    """
    with extra("the stream rotations"):
        from PIL import Image
    n_pixels = height * width
    # Rotate an image of the pixels' numbers, counted from 1 because Pillow fills what comes from outside with 0.
    numbers = Image.fromarray(np.arange(1, n_pixels + 1, dtype=np.int32).reshape(height, width))
    source = torch.from_numpy(np.array(numbers.rotate(angle))).flatten().long() - 1
    return source.masked_fill(source < 0, n_pixels)


def _show(
    data: ImageData,
    n_tasks: int,
    samples_per_task: int,
    generator: torch.Generator,
    pixel_map: Callable[[int], tuple[Tensor, float]],
) -> PixelStream:
    """Makes a stream; `pixel_map` makes the map and the angle of each task in turn."""
    n_train = len(data.train_labels)
    if samples_per_task > n_train:
        most = f"at most {n_train}, the training examples of {data.name}"
        raise InputError(f"--samples-per-task must be {most}, got {samples_per_task}")
    tasks = []
    for task in range(n_tasks):
        pixels, angle = pixel_map(task)
        sample = torch.randperm(n_train, generator=generator)[:samples_per_task]
        images = _with_blank(data.train_images[sample])[:, pixels]
        tasks.append(PixelTask(images, data.train_labels[sample], range(data.n_outputs), pixels, angle))
    test_images = to_unit(_with_blank(data.test_images)).T.contiguous()
    return PixelStream(tuple(tasks), data.n_outputs, data.name, "mlp", test_images, data.test_labels)


def _with_blank(images: Tensor) -> Tensor:
    return torch.nn.functional.pad(images.flatten(1), (0, 1))
