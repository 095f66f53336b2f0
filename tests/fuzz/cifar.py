"""Fuzz target: the reader of CIFAR-100. An archive or a pickle is read, or refused in one sentence."""

import struct
import tempfile
from pathlib import Path

import numpy as np
from fuzz.draw import Draw
from fuzz.sentence import check_sentence
from utils.python2_pickles import archive, cifar_files, pickled

from gem_fast.paper.cifar import read_archive, read_folder
from gem_fast.paper.errors import InputError
from gem_fast.paper.pickles import PickleError, loads

FOLDER = tempfile.TemporaryDirectory(prefix="fuzz_cifar_")
FILES = cifar_files(n_train=3, n_test=2)
SOUND = [*FILES.values(), pickled({b"data": np.arange(6).reshape(2, 3), "text": ["a", None, 300, -1]})]
# What instructions are made of, those that the reader knows and those that it must not follow.
PIECES = [bytes([code]) for code in range(256)]
PIECES += [b"U\x01b", b"K\x00", b"h\x07", b"q\x07", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cos\nsystem\n"]
PIECES += [b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.numeric\n_frombuffer\n", b"U\x02u1", b"U\x02O8"]
PIECES += [b"r" + struct.pack("<I", 2**32 - 1), b"\x8e" + struct.pack("<Q", 2**62), b"\x95" + struct.pack("<Q", 2**62)]


def spoiled(draw: Draw, data: bytes) -> bytes:
    """The same bytes with a few changed, taken out or put in, mostly among the instructions at both ends."""
    for _ in range(1 + draw.below(4)):
        place = draw.below(65536) % len(data)
        if draw.one_in(2):
            place = place % 64 if place % 2 else len(data) - 1 - place % 64
        data = data[:place] + draw.pick(PIECES) + data[place + draw.below(4) :] or b"\0"
    return data


def pickle_of(draw: Draw) -> bytes:
    """A sound pickle, a spoiled one, instructions in any order, or any bytes."""
    kind = draw.below(6)
    if kind == 0:
        return draw.rest()
    if kind < 3:
        return b"\x80\x02" + b"".join(draw.pick(PIECES) for _ in range(draw.below(32))) + b"."
    data = draw.pick(SOUND)
    return data if kind == 3 else spoiled(draw, data)


def check_plain(value: object, depth: int = 4) -> None:
    """Only plain data may come out."""
    assert type(value) in (int, bool, bytes, str, list, dict, type(None), np.ndarray), f"a {type(value).__name__}"
    if isinstance(value, np.ndarray):
        assert value.dtype.kind in "iu"
        value.sum()  # reads all of it
    elif isinstance(value, list) and depth:
        for part in value[:10]:
            check_plain(part, depth - 1)
    elif isinstance(value, dict) and depth:
        for key, part in list(value.items())[:10]:
            assert type(key) in (bytes, str)
            check_plain(part, depth - 1)


def target(data: bytes) -> None:
    """Reads a pickle as such, in a folder, or in an archive, which may be spoiled itself."""
    draw = Draw(data)
    form = draw.below(8)
    try:
        if form < 5:
            check_plain(loads(pickle_of(draw)))
            return
        files = {**FILES, draw.pick(["train", "test"]): pickle_of(draw)}
        if form == 5:
            for name, contents in files.items():
                (Path(FOLDER.name) / name).write_bytes(contents)
            parts = read_folder(Path(FOLDER.name))
        else:
            path = Path(FOLDER.name) / "file.tar.gz"
            packed = archive(files)
            path.write_bytes(spoiled(draw, packed) if form == 7 else packed)
            parts = read_archive(path)
    except (PickleError, InputError) as error:
        check_sentence(error)
        return
    for part in parts.values():
        assert part.images.shape == (len(part.labels), 3, 32, 32)
        assert part.labels.min() >= 0
        assert part.labels.max() < 100
