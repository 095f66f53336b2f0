"""Small IDX files for the tests, written independently of the reader."""

import gzip
import struct
from pathlib import Path

import numpy as np


def idx_bytes(array):
    """The IDX file of a uint8 array."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(path: Path, array):
    """Writes a uint8 array as an IDX file, compressed if the name says so."""
    contents = idx_bytes(np.asarray(array, dtype=np.uint8))
    path.write_bytes(gzip.compress(contents) if path.suffix == ".gz" else contents)


def write_folder(folder: Path, n_train=60, n_test=30, size=(6, 5), seed=0, n_classes=4, suffix=""):
    """Writes a data set that can be learned: the class is where the bright stripe is. Returns its four arrays."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, n in (("train", n_train), ("t10k", n_test)):
        labels = rng.integers(n_classes, size=n, dtype=np.uint8)
        labels[:n_classes] = range(n_classes)
        images = rng.integers(60, size=(n, *size), dtype=np.uint8)
        images[np.arange(n), labels] += 190
        arrays[part] = images, labels
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return arrays
