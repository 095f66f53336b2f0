"""Reads IDX files, the format MNIST and its relatives ship in.

A file of unsigned bytes is: the bytes 0, 0, 8 and the number of dimensions; each dimension as a big-endian 32-bit
unsigned integer; the values in row-major order; nothing after them.
"""

from __future__ import annotations

import gzip
import math
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gem_fast.paper.data.images import ImageData
from gem_fast.paper.errors import InputError
from gem_fast.paper.files import read_bounded, readable

__all__ = ["read_idx", "read_idx_folder"]

# EMNIST's largest file has 547 MB. A small file may unpack to any size.
MAX_BYTES = 1 << 30
# The names as MNIST, Fashion-MNIST and KMNIST ship (train, t10k; some unpack to a dot before idx) and as EMNIST ships
# (emnist-letters-train, emnist-letters-test).
FILE_NAME = re.compile(
    r"(?:emnist-(?P<split>[a-z]+)-)?(?P<part>train|t10k|test)-(?P<kind>images-idx3|images\.idx3|labels-idx1|labels\.idx1)"
    r"-ubyte(?:\.gz)?"
)


def read_idx(path: Path, ndim: int) -> npt.NDArray[np.uint8]:
    """Reads one IDX file of unsigned bytes.

    Args:
        path: The file; gzip-compressed if and only if its name ends in .gz.
        ndim: The number of dimensions the file must have: 3 for images (n, height, width), 1 for labels (n,).

    Returns:
        A uint8 array with `ndim` dimensions, none of them 0.

    Raises:
        InputError: The file cannot be read, is not such an IDX file, is truncated, empty or has bytes left over. No
            other exception comes from the contents of a file. Memory use grows with the bytes that the file has, not
            with the sizes that its header claims.
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
    if got < size:
        raise InputError(f"{path} is truncated: its header promises {size} bytes, shape {shape}, and {got} are there")
    if got > size:
        raise InputError(f"{path} has bytes left over after the {size} that its header promises, shape {shape}")
    return np.frombuffer(contents, np.uint8, offset=start).reshape(shape)


def read_idx_folder(folder: Path) -> ImageData:
    """Reads the four files of a folder, images and labels for training and for testing.

    Args:
        folder: The folder.

    Returns:
        The data on the CPU.

    Raises:
        InputError: It has not one of each, or several data sets; a file is not sound; images and labels differ in
            number, or training and test images in size.
        OSError: There is no such folder.
    """
    matches = [match for match in map(FILE_NAME.fullmatch, sorted(entry.name for entry in folder.iterdir())) if match]
    splits = sorted({match["split"] or "without a prefix" for match in matches})
    if len(splits) > 1:
        raise InputError(f"{folder} holds several data sets ({', '.join(splits)}): put one into a folder of its own")
    found: dict[tuple[str, str], str] = {}
    for match in matches:
        part = "train" if match["part"] == "train" else "test"
        # A file beside its own .gz is common (unpacked, archive kept): the first in the order of names is taken.
        found.setdefault((part, match["kind"][:6]), match[0])

    def read(part: str, kind: str, ndim: int) -> Tensor:
        name = found.get((part, kind))
        if name is None:
            example = f"{'train' if part == 'train' else 't10k'}-{kind}-idx{ndim}-ubyte"
            raise InputError(f"{folder} has no {part} {kind}: expected a file like {example} or {example}.gz")
        return torch.tensor(read_idx(folder / name, ndim))

    sets = {part: (read(part, "images", 3), read(part, "labels", 1).long()) for part in ("train", "test")}
    for part, (images, labels) in sets.items():
        if len(images) != len(labels):
            raise InputError(f"{folder} has {len(images)} {part} images but {len(labels)} {part} labels")
    train_size, test_size = (tuple(sets[part][0].shape[1:]) for part in ("train", "test"))
    if train_size != test_size:
        raise InputError(f"{folder} has training images of size {train_size} but test images of size {test_size}")
    return ImageData(str(folder), *sets["train"], *sets["test"])
