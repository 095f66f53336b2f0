"""Reads CIFAR-100 as it ships for Python: the folder cifar-100-python, or the .tar.gz that holds it.

The folder has two pickles, train and test. Each is a dictionary with `data`, an array (n, 3072) of bytes, an image a
row, red before green before blue, and `fine_labels`, a list of n classes; other keys are
ignored. An archive is read as a stream: nothing is unpacked to the disk.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gem_fast.paper.errors import InputError
from gem_fast.paper.files import readable
from gem_fast.paper.pickles import PickleError, loads

__all__ = [
    "FOLDER",
    "IMAGE_SHAPE",
    "N_CLASSES",
    "PARTS",
    "STAND_IN_LABEL",
    "Part",
    "is_archive",
    "is_folder",
    "read_archive",
    "read_folder",
]

FOLDER = "cifar-100-python"
PARTS = ("train", "test")
N_CLASSES = 100
IMAGE_SHAPE = (3, 32, 32)
# The batch_label of archives that gem_fast makes itself.
STAND_IN_LABEL = b"a stand-in, not CIFAR-100"
# CIFAR-100 has 155 MB in train and 186 MB in the whole archive. A small file may claim, or unpack to, any size.
MAX_BYTES = 1 << 28
MAX_ARCHIVE_BYTES = 1 << 29
MAX_MEMBERS = 1000
CHUNK = 1 << 20


class Part(NamedTuple):
    """The training or the test set."""

    images: npt.NDArray[np.uint8]
    """Shape (n, 3, 32, 32)."""
    labels: npt.NDArray[np.int64]
    """Shape (n,), classes 0 ... 99."""
    stand_in: bool
    """Whether it says of itself that it is not CIFAR-100 but a stand-in."""


def is_archive(path: Path) -> bool:
    """Whether a file's name says that it is an archive."""
    return path.name.endswith((".tar.gz", ".tgz"))


def is_folder(path: Path) -> bool:
    """Whether a folder holds the two files."""
    return all((path / part).is_file() for part in PARTS)


def read_folder(folder: Path) -> dict[str, Part]:
    """Reads the files train and test of a folder.

    Args:
        folder: The folder.

    Returns:
        Both parts, train and test.

    Raises:
        InputError: A file cannot be read or is not what it should be. No other exception comes from its contents, and
            nothing in it is executed.
    """
    parts = {}
    for part in PARTS:
        path = folder / part
        with readable(path), path.open("rb") as file:
            contents = file.read(MAX_BYTES + 1)
        parts[part] = _parse(contents, str(path))
    return parts


def read_archive(path: Path) -> dict[str, Part]:
    """Reads the members cifar-100-python/train and cifar-100-python/test of a .tar.gz.

    Args:
        path: The archive.

    Returns:
        As read_folder.

    Raises:
        InputError: As read_folder. Memory and time are bounded, whatever sizes the archive claims or unpacks to.
    """
    with readable(path), gzip.open(path) as file:
        bounded = _BoundedFile(file, path)
        members = _members(bounded, path)
        while bounded.read(CHUNK):  # the checksum comes last
            pass
    for part in PARTS:
        if part not in members:
            raise InputError(f"{path} has no {FOLDER}/{part}: it is truncated, or not the archive of CIFAR-100")
    return {part: _parse(members[part], f"{FOLDER}/{part} in {path}") for part in PARTS}


def _members(file: _BoundedFile, path: Path) -> dict[str, bytes]:
    names = {f"{FOLDER}/{part}": part for part in PARTS}
    found: dict[str, bytes] = {}
    try:
        # The mode for streams never seeks, so a header cannot send it around in circles.
        with tarfile.open(fileobj=file, mode="r|") as archive:  # type: ignore[call-overload]
            for count, member in enumerate(archive):
                part = names.get(member.name.removeprefix("./"))
                if part is not None and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse():
                    contents = archive.extractfile(member)
                    assert contents is not None
                    found[part] = contents.read(MAX_BYTES + 1)
                if len(found) == len(names) or count == MAX_MEMBERS:
                    break
    except (InputError, OSError, EOFError, zlib.error):
        raise
    except Exception as error:  # tarfile raises many kinds for what a file can hold
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is not a sound tar archive: {reason}") from error
    return found


class _BoundedFile:
    """A file of which at most MAX_ARCHIVE_BYTES can be read."""

    def __init__(self, file: gzip.GzipFile, path: Path) -> None:
        self._file = file
        self._path = path
        self._left = MAX_ARCHIVE_BYTES

    def read(self, size: int) -> bytes:
        contents = self._file.read(size)
        self._left -= len(contents)
        if self._left < 0:
            raise InputError(f"{self._path} must unpack to at most {MAX_ARCHIVE_BYTES} bytes, got more")
        return contents


def _parse(contents: bytes, name: str) -> Part:
    if len(contents) > MAX_BYTES:
        raise InputError(f"{name} must have at most {MAX_BYTES} bytes, got more")
    try:
        state = loads(contents)
    except PickleError as error:
        raise InputError(f"{name} {error}") from error
    if not isinstance(state, dict):
        raise InputError(f"{name} must hold a dictionary, got {type(state).__name__}")
    images, labels = _field(state, "data", name), _field(state, "fine_labels", name)
    n_pixels = int(np.prod(IMAGE_SHAPE))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (n_pixels,):
        got = f"shape {images.shape}, {images.dtype}" if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"data in {name} must be an array of shape (n, {n_pixels}), uint8, got {got}")
    stand_in = state.get(b"batch_label") == STAND_IN_LABEL
    return Part(images.reshape(-1, *IMAGE_SHAPE), _classes(labels, len(images), name), stand_in)


def _field(state: dict[Any, Any], key: str, name: str) -> Any:
    # Strings of Python 2 are bytes here.
    for form in (key.encode(), key):
        if form in state:
            return state[form]
    raise InputError(f"{name} must hold data and fine_labels, got a dictionary without {key}")


def _classes(labels: Any, n: int, name: str) -> npt.NDArray[np.int64]:
    if isinstance(labels, np.ndarray) and labels.ndim == 1:
        labels = labels.tolist()
    if not isinstance(labels, list) or len(labels) != n or n == 0:
        got = f"{len(labels)} labels" if isinstance(labels, list) else type(labels).__name__
        raise InputError(f"{name} must hold one of fine_labels for each of its {n} images, at least one, got {got}")
    for label in labels:
        if type(label) is not int or not 0 <= label < N_CLASSES:
            got = str(label)[:20] if type(label) is int else type(label).__name__
            raise InputError(f"fine_labels in {name} must be integers between 0 and {N_CLASSES - 1}, got {got}")
    return np.array(labels, dtype=np.int64)
