"""Pickles as Python 2 wrote them, instruction by instruction, and archives of CIFAR-100 made of them."""

import io
import struct
import tarfile

import numpy as np


def pickled(value) -> bytes:
    """A pickle of protocol 2 with cPickle's instructions."""
    return b"\x80\x02" + instructions(value) + b"."


def instructions(value) -> bytes:
    """What puts a value on the stack; lists and dictionaries come in one batch, nothing is remembered."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, bytes):  # a str of Python 2
        short = len(value) < 256
        return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value
    if isinstance(value, str):  # a unicode of Python 2
        return b"X" + struct.pack("<i", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(instructions, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(instructions, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(instructions(part) for item in value.items() for part in item) + b"u"
    assert isinstance(value, np.ndarray)
    dtype = b"cnumpy\ndtype\n" + instructions((value.dtype.str[1:].encode(), 0, 1)) + b"R"
    dtype += instructions((3, value.dtype.str[:1].encode(), None, None, None, -1, -1, 0)) + b"b"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + instructions((0,)) + b"U\x01btRq\x07"
    state = b"(" + instructions(1) + instructions(value.shape) + dtype + instructions(False)
    return made + state + instructions(value.tobytes()) + b"tb"


def cifar_files(n_train=30, n_test=20, seed=0) -> dict[str, bytes]:
    """The files of a small data set with the keys of the real one."""
    rng = np.random.default_rng(seed)
    files = {}
    for part, n in (("train", n_train), ("test", n_test)):
        labels = [int(label) for label in rng.integers(100, size=n)]
        state = {
            b"filenames": [b"bottle_%d.png" % i for i in range(n)],
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": labels,
            b"coarse_labels": [label // 5 for label in labels],
            b"data": rng.integers(256, size=(n, 3072), dtype=np.uint8),
        }
        files[part] = pickled(state)
    return files


def archive(files: dict[str, bytes], folder="cifar-100-python") -> bytes:
    """A .tar.gz with a folder, its files, and one more, as the real one has."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        head = tarfile.TarInfo(folder)
        head.type = tarfile.DIRTYPE
        tar.addfile(head)
        for name, contents in {"meta": b"names", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return packed.getvalue()
