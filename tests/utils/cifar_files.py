"""Small files in the binary format of CIFAR-100, written independently of the reader, and archives."""

import io
import tarfile
from pathlib import Path

import numpy as np


def cifar_arrays(n_train=30, n_test=20, seed=0):
    """Images (n, 3072) and fine labels (n,) of both sets, uint8, by the files' names."""
    rng = np.random.default_rng(seed)
    return {
        file: (rng.integers(256, size=(n, 3072), dtype=np.uint8), rng.integers(100, size=n, dtype=np.uint8))
        for file, n in (("train.bin", n_train), ("test.bin", n_test))
    }


def binary(images, labels, coarse=None) -> bytes:
    """One file: for each image a coarse label, the fine one, and the pixels."""
    coarse = labels // 5 if coarse is None else coarse
    return b"".join(bytes([c, f]) + image.tobytes() for c, f, image in zip(coarse, labels, images, strict=True))


def cifar_files(n_train=30, n_test=20, seed=0) -> dict[str, bytes]:
    """Both files of a small data set."""
    return {file: binary(*arrays) for file, arrays in cifar_arrays(n_train, n_test, seed).items()}


def all_classes(folder: Path, train_per_class=1, test_per_class=1) -> Path:
    """Makes a folder with random images of all 100 classes, in no order."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for file, per_class in (("train.bin", train_per_class), ("test.bin", test_per_class)):
        labels = rng.permutation(np.repeat(np.arange(100, dtype=np.uint8), per_class))
        images = rng.integers(256, size=(len(labels), 3072), dtype=np.uint8)
        (folder / file).write_bytes(binary(images, labels))
    return folder


def archive(files: dict[str, bytes], folder="cifar-100-binary") -> bytes:
    """A .tar.gz with a folder, its files, and one more, as the real one has."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        head = tarfile.TarInfo(folder)
        head.type = tarfile.DIRTYPE
        tar.addfile(head)
        for name, contents in {"fine_label_names.txt": b"apple", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return packed.getvalue()
