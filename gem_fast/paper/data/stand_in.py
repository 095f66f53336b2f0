"""A stand-in for CIFAR-100, for tests: made-up images of its shape.

The images are no photographs, and results on them say nothing about CIFAR-100; they show that everything runs. Each
class has a smooth random pattern of colours. An image is the pattern of its class plus a pattern of its own, so that a
learner has to find out what the images of a class have in common.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gem_fast.paper.data.cifar import IMAGE_SHAPE, N_CLASSES
from gem_fast.paper.data.images import ImageData

STAND_IN = "cifar100-stand-in"
# What the names of made-up data end with.
STAND_IN_SUFFIX = " (a stand-in, not CIFAR-100)"


def make_stand_in(seed: int = 0, train_per_class: int = 50, test_per_class: int = 10) -> ImageData:
    """Images of 100 classes, under a name that says what they are.

    The seed is that of the patterns, the noise and the order; CIFAR-100 has 500 training and 100 test examples of each
    class.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = _patterns(N_CLASSES, generator)
    tensors = []
    for per_class in (train_per_class, test_per_class):
        labels = torch.arange(N_CLASSES).repeat(per_class)[torch.randperm(N_CLASSES * per_class, generator=generator)]
        images = torch.empty(len(labels), *IMAGE_SHAPE, dtype=torch.uint8)
        for rows in torch.arange(len(labels)).split(1000):
            signal = patterns[labels[rows]] + _patterns(len(rows), generator)
            images[rows] = (128 + 25 * signal).clamp(0, 255).byte()
        tensors += [images, labels]
    return ImageData(STAND_IN + STAND_IN_SUFFIX, *tensors)


def _patterns(n: int, generator: torch.Generator) -> Tensor:
    """Smooth random patterns, shape (n, 3, 32, 32), of mean 0 and variance 1, roughly."""
    return F.interpolate(torch.randn(n, IMAGE_SHAPE[0], 4, 4, generator=generator), IMAGE_SHAPE[1:], mode="bicubic")
