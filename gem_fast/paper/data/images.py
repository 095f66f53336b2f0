"""A data set of labelled images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gem_fast.paper.errors import InputError


@dataclass(frozen=True)
class ImageData:
    """A training and a test set of labelled images."""

    name: str  # what the user called it: mnist-5k, or the folder or archive
    train_images: Tensor  # (n, height, width), uint8, 0 = background, or (n, 3, height, width) where in colour
    train_labels: Tensor  # (n,), int64, each >= 0
    test_images: Tensor  # (m, ...), uint8, likewise
    test_labels: Tensor  # (m,), int64

    @property
    def n_outputs(self) -> int:
        """The largest label of both sets plus one (EMNIST letters count from 1: their output 0 stays unused)."""
        return int(torch.maximum(self.train_labels.max(), self.test_labels.max())) + 1


def check_grey(data: ImageData, stream: str) -> None:
    """Raises InputError unless the images are grey, as `stream` needs them."""
    if data.train_images.dim() != 3:
        raise InputError(f"--data must hold grey images for the stream {stream}, got {data.name} with images in colour")
