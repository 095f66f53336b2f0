"""The stream `permutations`: each task shows the pixels of the images in an order of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from gem_fast.paper.data import ImageData, check_grey
from gem_fast.paper.streams.pixels import PixelStream, make_pixel_stream

__all__ = ["permutations"]


def permutations(data: ImageData, n_tasks: int, samples_per_task: int, generator: torch.Generator) -> PixelStream:
    """Each task permutes the pixels by a random permutation of its own.

    Args:
        data: The data set, of grey images.
        n_tasks: The number of tasks T >= 1.
        samples_per_task: Training examples of each task, drawn without replacement for each task anew.
        generator: A CPU generator, source of the permutations and the examples.

    Returns:
        The stream, on the CPU.

    Raises:
        InputError: The images are in colour, or more examples are asked for than there are.
    """
    check_grey(data, "permutations")
    n_pixels = data.test_images[0].numel()

    def pixel_map(task: int) -> Tensor:
        return torch.randperm(n_pixels, generator=generator)

    return make_pixel_stream(data, n_tasks, samples_per_task, generator, pixel_map)
