"""Streams that show one data set through a map of pixels for each task: rotations and permutations.

Each pixel of a task's image is some pixel of the original one, or blank: nearest-neighbour rotations and permutations
are both such maps. So a task keeps its map and its own training examples, and all tasks share one copy of the test set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gem_fast.gradients.fused.entries import TaskEntries
from gem_fast.paper.data import ImageData, check_grey
from gem_fast.paper.errors import InputError, extra
from gem_fast.paper.streams.base import Stream, Task, to_unit

# Test images that are answered at once: moving the weights is once for all of them.
TEST_BATCH = 10_000


class ShownImages(Tensor):
    """Images through a map of pixels, shape (m, shown pixels), for inference.

    F.linear does not look at them: it moves the columns of its weight to where the originals have the pixels. Any other
    function of torch gets the images.
    """

    _originals: Tensor
    _entries: TaskEntries | None
    _pixel_map: Tensor

    @staticmethod
    def of(originals: Tensor, entries: TaskEntries | None, pixel_map: Tensor) -> ShownImages:
        """Shows originals, shape (pixels, m), float32: pixel by pixel, so that a task's pixels are copied as rows.

        `entries` are those that are not zero, image by image; None where there are many, or not on the CPU. The map,
        shape (shown pixels,), int64, tells which pixel of the original each pixel is.
        """
        # Its own contents take no memory, and are never read: nan would tell.
        nothing = originals.new_full((), torch.nan).expand(originals.shape[1], len(pixel_map))
        shown = nothing.as_subclass(ShownImages)
        shown._originals, shown._entries, shown._pixel_map = originals, entries, pixel_map
        return shown

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function of torch that is given such images."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and isinstance(args[0], cls):
                return args[0]._linear(*args[1:], **(kwargs or {}))
            return func(*tree_map_only(cls, cls._images, args), **tree_map_only(cls, cls._images, kwargs or {}))

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        moved = weight.new_zeros(len(self._originals), len(weight)).index_add_(0, self._pixel_map, weight.T).T
        if self._entries is None:
            return F.linear(self._originals.T, moved, bias)
        output: Tensor = torch.ops.gem_fast._sparse_linear(*self._entries.by_rows, None, moved, bias)
        return output

    def _images(self) -> Tensor:
        return self._originals.index_select(0, self._pixel_map).T


@dataclass(frozen=True)
class PixelTask(Task):
    """A task with its map of pixels, through which `images` are already seen.

    The map, shape (pixels,), int64, tells which pixel of the original each pixel of this task shows; the number
    `pixels`, one past the last, stands for a blank pixel.
    """

    pixel_map: Tensor
    angle: float = 0.0  # the degrees by which the map turns images; 0 where it does something else


@dataclass(frozen=True)
class PixelStream(Stream):
    """Tasks that share a test set and all outputs."""

    tasks: Sequence[PixelTask]
    test_images: Tensor  # (pixels + 1, m), float32 in [0, 1]: the originals and one blank pixel, pixel by pixel
    test_labels: Tensor  # (m,), int64

    def test_batches(self, task: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole test set as the task shows it, in a fixed order; x, as `ShownImages`, and y as in `batches`."""
        for originals, labels in zip(self._originals, self.test_labels.split(TEST_BATCH), strict=True):
            yield ShownImages.of(*originals, self.tasks[task].pixel_map), labels

    @cached_property
    def _originals(self) -> list[tuple[Tensor, TaskEntries | None]]:
        """The test images of each batch, and their entries."""
        return [(images, TaskEntries.of(images.T)) for images in self.test_images.split(TEST_BATCH, dim=1)]


def rotations(data: ImageData, n_tasks: int, samples_per_task: int, generator: torch.Generator) -> PixelStream:
    """Each task rotates the images by an angle of its own, on the CPU.

    The angle of task k is uniform in its slice [k, k + 1) * 180 / T degrees; pixels are taken from the nearest
    neighbour, and those from outside of the image are blank. The training examples of each task are drawn without
    replacement for each task anew; the CPU generator is the source of angles and examples.

    Raises InputError where the images are in colour, more examples are asked for than there are, or Pillow is missing.
    """
    check_grey(data, "rotations")
    height, width = data.test_images.shape[1:]
    shares = (task + torch.rand((), generator=generator, dtype=torch.float64).item() for task in range(n_tasks))
    angles = (share * 180 / n_tasks for share in shares)
    return _show(data, samples_per_task, generator, ((rotation_map(height, width, angle), angle) for angle in angles))


def permutations(data: ImageData, n_tasks: int, samples_per_task: int, generator: torch.Generator) -> PixelStream:
    """Each task permutes the pixels by a random permutation of its own; arguments, result and errors as `rotations`."""
    check_grey(data, "permutations")
    n_pixels = data.test_images[0].numel()
    maps = ((torch.randperm(n_pixels, generator=generator), 0.0) for _ in range(n_tasks))
    return _show(data, samples_per_task, generator, maps)


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
    data: ImageData, samples_per_task: int, generator: torch.Generator, maps: Iterator[tuple[Tensor, float]]
) -> PixelStream:
    """Makes a stream of the maps and angles, each of which is drawn just before the examples of its task."""
    n_train = len(data.train_labels)
    if samples_per_task > n_train:
        most = f"at most {n_train}, the training examples of {data.name}"
        raise InputError(f"--samples-per-task must be {most}, got {samples_per_task}")
    tasks = []
    for pixels, angle in maps:
        sample = torch.randperm(n_train, generator=generator)[:samples_per_task]
        images = _with_blank(data.train_images[sample])[:, pixels]
        tasks.append(PixelTask(images, data.train_labels[sample], range(data.n_outputs), pixels, angle))
    test_images = to_unit(_with_blank(data.test_images)).T.contiguous()
    return PixelStream(tuple(tasks), data.n_outputs, data.name, "mlp", test_images, data.test_labels)


def _with_blank(images: Tensor) -> Tensor:
    return F.pad(images.flatten(1), (0, 1))
