"""Reads IDX files, the format MNIST and its relatives ship in.

A file of unsigned bytes is: the bytes 0, 0, 8 and the number of dimensions; each dimension as a big-endian 32-bit
unsigned integer; the values in row-major order; nothing after them.
"""

import gzip
import math
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from gem_fast.paper.data.images import ImageData
from gem_fast.paper.errors import InputError
from gem_fast.paper.files import read_bounded, readable

# EMNIST's largest file has 547 MB. A small file may unpack to any size.
MAX_BYTES = 1 << 30
# The names as MNIST, Fashion-MNIST and KMNIST ship (train, t10k; some unpack to a dot before idx) and as EMNIST ships
# (emnist-letters-train, emnist-letters-test).
FILE_NAME = re.compile(
    r"(?:emnist-(?P<split>[a-z]+)-)?(?P<part>train|t10k|test)-(?P<kind>images(?=.idx3)|labels(?=.idx1))[-.]idx\d-ubyte"
    r"(?:\.gz)?"
)


def read_idx(path: Path, ndim: int) -> npt.NDArray[np.uint8]:
    """Reads one IDX file of unsigned bytes, gzip-compressed if and only if its name ends in .gz.

    Returns a uint8 array with `ndim` dimensions, none of them 0: 3 of images (n, height, width), 1 of labels (n,).

    Raises InputError where the file cannot be read, is not such an IDX file, is truncated, empty or has bytes left
    over. No other exception comes from its contents. Memory use grows with the bytes that the file has, not with the
    sizes that its header claims.
    """
    with readable(path), gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        contents = read_bounded(file, path, MAX_BYTES)
    magic = bytes([0, 0, 8, ndim])
    if contents[:4] != magic:
        raise InputError(
            f"{path} is not an IDX file of unsigned bytes with {ndim} dimension{'s' if ndim > 1 else ''}: "
            f"it must begin with the bytes {magic.hex(' ')}, got {contents[:4].hex(' ') or 'an empty file'}"
        )
    start = 4 + 4 * ndim
    if len(contents) < start:
        raise InputError(f"{path} is truncated: it ends inside its header of {start} bytes")
    shape = tuple(np.frombuffer(contents, ">u4", ndim, offset=4).tolist())
    size, got = math.prod(shape), len(contents) - start
    if size == 0:
        raise InputError(f"{path} is empty: its header gives the shape {shape}")
    if got != size:
        reason = "is truncated" if got < size else "has bytes left over"
        raise InputError(f"{path} {reason}: its header promises {size} bytes, shape {shape}, and {got} are there")
    return np.frombuffer(contents, np.uint8, offset=start).reshape(shape)


def read_idx_folder(folder: Path) -> ImageData:
    """Reads the four files of a folder, images and labels for training and for testing; the data are on the CPU.

    Raises InputError where it has not one of each, or several data sets, a file is not sound, images and labels differ
    in number, or training and test images in size; OSError where there is no such folder.
    """
    matches = [match for match in map(FILE_NAME.fullmatch, sorted(entry.name for entry in folder.iterdir())) if match]
    splits = sorted({match["split"] or "without a prefix" for match in matches})
    if len(splits) > 1:
        raise InputError(f"{folder} holds several data sets ({', '.join(splits)}): put one into a folder of its own")
    # A file beside its own .gz is common (unpacked, archive kept): the first in the order of names is taken.
    found = {(match["part"].replace("t10k", "test"), match["kind"]): match[0] for match in reversed(matches)}
    tensors = []
    for part in ("train", "test"):
        for kind, ndim in (("images", 3), ("labels", 1)):
            if (part, kind) not in found:
                example = f"{part.replace('test', 't10k')}-{kind}-idx{ndim}-ubyte"
                raise InputError(f"{folder} has no {part} {kind}: expected a file like {example} or {example}.gz")
            tensors.append(torch.tensor(read_idx(folder / found[part, kind], ndim)))
        images, labels = tensors[-2:]
        tensors[-1] = labels.long()
        if len(images) != len(labels):
            raise InputError(f"{folder} has {len(images)} {part} images but {len(labels)} {part} labels")
    train_size, test_size = (tuple(images.shape[1:]) for images in tensors[::2])
    if train_size != test_size:
        raise InputError(f"{folder} has training images of size {train_size} but test images of size {test_size}")
    return ImageData(str(folder), *tensors)
