"""A stand-in for CIFAR-100, where the real archive is not at hand: made-up images in the same format.

The images are no photographs, and results on them say nothing about CIFAR-100; they show that everything runs. Each
class has a smooth random pattern of colours. An image is the pattern of its class plus a pattern of its own, so that a
learner has to find out what the images of a class have in common.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gem_fast.paper.cifar import FOLDER, IMAGE_SHAPE, N_CLASSES, PARTS, STAND_IN_LABEL, Part
from gem_fast.paper.files import write_file

__all__ = ["STAND_IN", "make_stand_in", "write_stand_in"]

STAND_IN = "cifar100-stand-in"


def make_stand_in(
    seed: int = 0, train_per_class: int = 50, test_per_class: int = 10, n_classes: int = N_CLASSES
) -> dict[str, Part]:
    """Makes images of up to 100 classes.

    Args:
        seed: Of the patterns, the noise and the order.
        train_per_class: Training examples of each class; CIFAR-100 has 500.
        test_per_class: Test examples of each class; CIFAR-100 has 100.
        n_classes: Classes; CIFAR-100 has 100.

    Returns:
        Both parts, train and test.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = _patterns(n_classes, generator)
    parts: dict[str, Part] = {}
    for part, per_class in zip(PARTS, (train_per_class, test_per_class), strict=True):
        labels = torch.arange(n_classes).repeat(per_class)[torch.randperm(n_classes * per_class, generator=generator)]
        images = torch.empty(len(labels), *IMAGE_SHAPE, dtype=torch.uint8)
        for rows in torch.arange(len(labels)).split(1000):
            signal = patterns[labels[rows]] + _patterns(len(rows), generator)
            images[rows] = (128 + 25 * signal).clamp(0, 255).byte()
        parts[part] = Part(images.numpy(), labels.numpy(), stand_in=True)
    return parts


def _patterns(n: int, generator: torch.Generator) -> Tensor:
    """Smooth random patterns, shape (n, 3, 32, 32), of mean 0 and variance 1, roughly."""
    return F.interpolate(torch.randn(n, IMAGE_SHAPE[0], 4, 4, generator=generator), IMAGE_SHAPE[1:], mode="bicubic")


def write_stand_in(path: Path, **options: int) -> None:
    """Writes an archive in the format of cifar-100-python.tar.gz, whose batch_label says that it is a stand-in.

    Args:
        path: The file. Its name should say so, too.
        options: The arguments of make_stand_in.

    Raises:
        OSError: It cannot be written.
    """
    archive = io.BytesIO()
    # Without times, so that the same seed gives the same bytes.
    with gzip.GzipFile(fileobj=archive, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for part, (images, labels, _) in make_stand_in(**options).items():
            state = {
                b"batch_label": STAND_IN_LABEL,
                b"fine_labels": labels.tolist(),
                b"data": images.reshape(len(images), -1),
            }
            contents = pickle.dumps(state, protocol=4)
            member = tarfile.TarInfo(f"{FOLDER}/{part}")
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    write_file(path, archive.getvalue())
