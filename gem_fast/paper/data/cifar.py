"""Reads CIFAR-100 in its binary format, and its Python format where the files are the published ones.

The binary format is two files, train.bin and test.bin. Each image is 3074 bytes: its coarse and its fine label, and
3072 pixels, red before green before blue. The Python format is two pickles. A pickle can run any code when it is
loaded, so only those with the checksums that torchvision publishes are. An archive is not unpacked to the disk.
"""

import gzip
import hashlib
import io
import itertools
import math
import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gem_fast.paper.data.images import ImageData
from gem_fast.paper.errors import InputError
from gem_fast.paper.files import read_bounded, readable

N_CLASSES = 100
N_COARSE = 20
IMAGE_SHAPE = (3, 32, 32)
N_PIXELS = math.prod(IMAGE_SHAPE)
# folder -> the training and the test set
FORMATS = {"cifar-100-binary": ("train.bin", "test.bin"), "cifar-100-python": ("train", "test")}
# The pickles' checksums, as in torchvision.datasets.CIFAR100.
MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
# CIFAR-100 has 155 MB in train and 186 MB in the whole archive. A small file may claim, or unpack to, any size.
MAX_BYTES = 1 << 28
MAX_ARCHIVE_BYTES = 1 << 29
MAX_MEMBERS = 1000
# By label, as in the archive's fine_label_names.txt.
NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man
maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail
snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout
tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CLASS_NAMES = tuple(name.replace("_", " ") for name in NAMES.split())


def read_folder(folder: Path) -> ImageData | None:
    """Reads the two files of a folder in one of FORMATS, whatever its name; None where it has neither.

    The data are on the CPU, with labels 0 ... 99. Raises InputError where a file cannot be read or is not what it
    should be. No other exception comes from its contents, and nothing in it is executed.
    """
    found = {}
    for path in (folder / file for files in FORMATS.values() for file in files):
        if path.is_file():
            with readable(path), path.open("rb") as file:
                found[path.name] = read_bounded(file, path, MAX_BYTES)
    return _image_data(folder, found)


def read_archive(path: Path) -> ImageData:
    """Reads the two files of cifar-100-binary or cifar-100-python in a .tar.gz; result and errors as read_folder's.

    Memory and time are bounded, whatever sizes the archive claims or unpacks to.
    """
    with readable(path), gzip.open(path) as file:
        unpacked = read_bounded(file, path, MAX_ARCHIVE_BYTES, "unpack to")
    if (data := _image_data(path, _members(unpacked, path))) is None:
        missing = " or ".join(f"{folder}/{' and '.join(files)}" for folder, files in FORMATS.items())
        raise InputError(f"{path} has no {missing}: it is truncated, or not the archive of CIFAR-100")
    return data


def _members(unpacked: bytes, path: Path) -> dict[str, bytes]:
    """The files of FORMATS in a tar archive, by name."""
    names = {f"{folder}/{file}": file for folder, files in FORMATS.items() for file in files}
    found: dict[str, bytes] = {}
    try:
        # The mode for streams never seeks, so a header cannot send it around in circles.
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r|") as archive:
            for member in itertools.islice(archive, MAX_MEMBERS):
                name = names.get(member.name.removeprefix("./"))
                if name and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse():
                    contents = archive.extractfile(member)
                    assert contents is not None
                    found[name] = read_bounded(contents, f"{name} in {path}", MAX_BYTES)
    except InputError:
        raise
    except Exception as error:  # tarfile raises many kinds for what a file can hold
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is not a sound tar archive: {reason}") from error
    return found


def _image_data(path: Path, found: dict[str, bytes]) -> ImageData | None:
    """The data of the training and the test set; None unless both files of one of FORMATS were found there."""
    for files in FORMATS.values():
        if found.keys() >= {*files}:
            tensors = [tensor for file in files for tensor in _parse(file, found[file], f"{file} in {path}")]
            if len(tensors[1]) < len(tensors[3]):
                raise InputError(
                    f"{path} must have no more test than training images, got {len(tensors[1])} for training and "
                    f"{len(tensors[3])} for testing: were the files swapped?"
                )
            return ImageData(str(path), *tensors)
    return None


def _parse(file: str, contents: bytes, where: str) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    if expected := MD5.get(file):
        digest = hashlib.md5(contents, usedforsecurity=False).hexdigest()
        if digest != expected:
            raise InputError(
                f"{where} must be the published file, whose MD5 is {expected}, got {digest}; a pickle of anybody else "
                "is not loaded: use the binary format, cifar-100-binary.tar.gz"
            )
        state = pickle.loads(contents, encoding="bytes")
        return torch.tensor(state[b"data"]).view(-1, *IMAGE_SHAPE), torch.tensor(state[b"fine_labels"])
    size = 2 + N_PIXELS
    if len(contents) == 0 or len(contents) % size:
        raise InputError(
            f"{where} must have {size} bytes for each image of CIFAR-100, at least one, got {len(contents)} bytes: "
            "it is truncated, or another file"
        )
    rows = np.frombuffer(contents, np.uint8).reshape(-1, size)
    coarse, fine = rows[:, 0], rows[:, 1]
    # Each class belongs to one of the coarse ones: labels that are something else do not come in as few pairs.
    pairs = np.unique(rows[:, :2], axis=0)
    if coarse.max() >= N_COARSE or fine.max() >= N_CLASSES or len(pairs) > len(np.unique(fine)):
        raise InputError(
            f"{where} must have a coarse label below {N_COARSE}, the same for all images of a class, and a fine one "
            f"below {N_CLASSES} before each image, got others"
        )
    return torch.tensor(rows[:, 2:]).view(-1, *IMAGE_SHAPE), torch.tensor(fine, dtype=torch.int64)
