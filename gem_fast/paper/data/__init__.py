"""Data sets of small images: MNIST and its relatives as IDX files, CIFAR-100, and what torchvision has stored."""

from gem_fast.paper.data.images import ImageData, check_grey
from gem_fast.paper.data.sources import MNIST_5K, NAMES, default_root, download, load_data
from gem_fast.paper.data.stand_in import STAND_IN, STAND_IN_SUFFIX

__all__ = [
    "MNIST_5K",
    "NAMES",
    "STAND_IN",
    "STAND_IN_SUFFIX",
    "ImageData",
    "check_grey",
    "default_root",
    "download",
    "load_data",
]
