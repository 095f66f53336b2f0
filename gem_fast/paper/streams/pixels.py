"""Streams that show one data set through a map of pixels for each task.

Each pixel of a task's image is some pixel of the original one, or blank: nearest-neighbour rotations and permutations
are both such maps. So a task keeps its map and its own training examples, and all tasks share one copy of the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gem_fast.paper.data import ImageData
from gem_fast.paper.errors import InputError
from gem_fast.paper.streams.base import Stream, Task, to_unit
from gem_fast.paper.streams.shown import Originals, ShownImages

__all__ = ["PixelStream", "PixelTask", "make_pixel_stream"]

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


def make_pixel_stream(
    data: ImageData,
    n_tasks: int,
    samples_per_task: int,
    generator: torch.Generator,
    pixel_map: Callable[[int], Tensor],
) -> PixelStream:
    """Makes a stream.

    Args:
        data: The data set, of grey images.
        n_tasks: The number of tasks T >= 1.
        samples_per_task: Training examples of each task, drawn without replacement for each task anew.
        generator: A CPU generator, source of the examples.
        pixel_map: Makes the map of a task, 0 ... T - 1; called once for each, in order.

    Returns:
        The stream, on the CPU.

    Raises:
        InputError: More examples are asked for than there are.
    """
    n_train = len(data.train_labels)
    if samples_per_task > n_train:
        raise InputError(
            f"--samples-per-task must be at most {n_train}, the training examples of {data.name}, "
            f"got {samples_per_task}"
        )

    def make_task(task: int) -> PixelTask:
        pixels = pixel_map(task)
        sample = torch.randperm(n_train, generator=generator)[:samples_per_task]
        images = _with_blank(data.train_images[sample])[:, pixels]
        return PixelTask(images, data.train_labels[sample], range(data.n_outputs), pixels)

    tasks = tuple(make_task(task) for task in range(n_tasks))
    test_images = to_unit(_with_blank(data.test_images)).T.contiguous()
    return PixelStream(tasks, data.n_outputs, data.name, "mlp", test_images, data.test_labels)


def _with_blank(images: Tensor) -> Tensor:
    return torch.nn.functional.pad(images.flatten(1), (0, 1))
