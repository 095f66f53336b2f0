"""Data sets of small images: MNIST and its relatives as IDX files, CIFAR-100, and what torchvision has stored."""

from gem_fast.paper.data.images import ImageData, check_grey
from gem_fast.paper.data.sources import MNIST_5K, download, load_data

__all__ = ["MNIST_5K", "ImageData", "check_grey", "download", "load_data"]
