"""The stream `rotations`: each task shows the images turned by an angle of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gem_fast.paper.data import ImageData, check_grey
from gem_fast.paper.errors import extra
from gem_fast.paper.streams.pixels import PixelStream, make_pixel_stream

__all__ = ["rotation_map", "rotations"]


def rotations(data: ImageData, n_tasks: int, samples_per_task: int, generator: torch.Generator) -> PixelStream:
    """Each task rotates the images by an angle of its own.

    The angle of task k is uniform in its slice [k, k + 1) * 180 / T degrees; pixels are taken from the nearest
    neighbour, and those from outside of the image are blank.

    Args:
        data: The data set, of grey images.
        n_tasks: The number of tasks T >= 1.
        samples_per_task: Training examples of each task, drawn without replacement for each task anew.
        generator: A CPU generator, source of the angles and the examples.

    Returns:
        The stream, on the CPU.

    Raises:
        InputError: The images are in colour, more examples are asked for than there are, or Pillow is missing.
    """
    check_grey(data, "rotations")
    height, width = data.test_images.shape[1:]
    angles = []

    def pixel_map(task: int) -> Tensor:
        angle = (task + torch.rand((), generator=generator, dtype=torch.float64).item()) * 180 / n_tasks
        angles.append(angle)
        return rotation_map(height, width, angle)

    stream = make_pixel_stream(data, n_tasks, samples_per_task, generator, pixel_map)
    tasks = zip(stream.tasks, angles, strict=True)
    return replace(stream, tasks=tuple(replace(task, angle=angle) for task, angle in tasks))


def rotation_map(height: int, width: int, angle: float) -> Tensor:
    """The map of pixels that rotates an image about its centre, as Pillow does.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        angle: Degrees counter-clockwise.

    Returns:
        Shape (height * width,), int64, as PixelTask.pixel_map.

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
