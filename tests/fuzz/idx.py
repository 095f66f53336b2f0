"""Fuzz target: the IDX reader. A file is read, or refused in one sentence; memory follows the bytes that are there."""

import gzip
import struct
import tempfile
from pathlib import Path

from fuzz.draw import Draw
from fuzz.sentence import check_sentence
from utils.idx_files import idx_bytes

from gem_fast.paper.data.idx import read_idx
from gem_fast.paper.errors import InputError

FOLDER = tempfile.TemporaryDirectory(prefix="fuzz_idx_")


def contents(draw: Draw, ndim: int) -> bytes:
    """A file: any bytes, or a header that is nearly right and any bytes after it."""
    if draw.one_in(4):
        return draw.rest()
    shape = [draw.pick([0, 1, 2, 3, 28, 255, 2**31, 2**32 - 1]) for _ in range(ndim)]
    magic = bytes([0, 0, draw.pick([8, 8, 8, 9]), draw.pick([ndim, ndim, ndim, draw.below(256)])])
    size = min(2**12, max(0, shape[0] * (shape[-1] if ndim > 1 else 1) * (shape[1] if ndim > 2 else 1)))
    body = draw.bytes(size) if draw.one_in(2) else draw.rest()
    return magic + struct.pack(f">{ndim}I", *shape) + body


def target(data: bytes) -> None:
    """Reads one file."""
    draw = Draw(data)
    ndim = 1 + draw.below(3)
    compressed, spoiled = draw.one_in(2), draw.one_in(3)
    raw = file = contents(draw, ndim)
    if compressed:
        file = gzip.compress(raw, compresslevel=1)
        if spoiled:
            place = draw.below(65536) % len(file)
            file = file[:place] + draw.bytes(draw.below(4)) + file[place + draw.below(4) :]
    path = Path(FOLDER.name) / ("file.gz" if compressed else "file")
    path.write_bytes(file)
    try:
        array = read_idx(path, ndim)
    except InputError as error:
        check_sentence(error)
        return
    assert array.ndim == ndim
    assert array.size > 0
    assert (compressed and spoiled) or idx_bytes(array) == raw, "read something else than the file holds"
