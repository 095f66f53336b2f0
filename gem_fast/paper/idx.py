"""Reads IDX files, the format MNIST and its relatives ship in.

A file of unsigned bytes is: the bytes 0, 0, 8 and the number of dimensions; each dimension as a big-endian 32-bit
unsigned integer; the values in row-major order; nothing after them.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gem_fast.paper.errors import InputError
from gem_fast.paper.files import readable

__all__ = ["read_idx"]

UNSIGNED_BYTE = 8
# Files are read in chunks, because a read of n bytes allocates n bytes first, and n comes from a header that may lie.
CHUNK = 1 << 20


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
        return _parse(file, path, ndim)


def _parse(file: io.BufferedIOBase, path: Path, ndim: int) -> npt.NDArray[np.uint8]:
    magic = bytes([0, 0, UNSIGNED_BYTE, ndim])
    start = file.read(len(magic))
    if start != magic:
        raise InputError(
            f"{path} is not an IDX file of unsigned bytes with {ndim} dimension{'s' if ndim > 1 else ''}: "
            f"it must begin with the bytes {magic.hex(' ')}, got {start.hex(' ') or 'an empty file'}"
        )
    header = file.read(4 * ndim)
    if len(header) < 4 * ndim:
        raise InputError(f"{path} is truncated: it ends inside its header of {len(magic) + 4 * ndim} bytes")
    shape = struct.unpack(f">{ndim}I", header)
    size = math.prod(shape)
    if size == 0:
        raise InputError(f"{path} is empty: its header gives the shape {shape}")
    values = bytearray()
    while len(values) < size:
        chunk = file.read(min(CHUNK, size - len(values)))
        if not chunk:
            raise InputError(
                f"{path} is truncated: its header promises {size} bytes, shape {shape}, and {len(values)} are there"
            )
        values += chunk
    if file.read(1):
        raise InputError(f"{path} has bytes left over after the {size} that its header promises, shape {shape}")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)
