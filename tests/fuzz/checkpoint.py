"""Fuzz target: the checkpoint reader. A file is read, or refused in one sentence, whatever a stranger put into it."""

import io
import tempfile
from pathlib import Path

import torch
from fuzz.draw import Draw
from fuzz.sentence import check_sentence

from gem_fast.paper.errors import InputError
from gem_fast.paper.experiments.checkpoint import read_checkpoint, signed

FOLDER = tempfile.TemporaryDirectory(prefix="fuzz_checkpoint_")


def saved() -> bytes:
    """What torch.save writes for a small state."""
    file = io.BytesIO()
    torch.save({"batch": 3, "weights": torch.arange(6.0).view(2, 3), "config": {"lr": 0.1, "name": "gem"}}, file)
    return file.getvalue()


SOUND = saved()


def payload(draw: Draw) -> bytes:
    """A sound state with a few bytes changed, taken out or put in, or any bytes at all."""
    if draw.one_in(4):
        return draw.rest()
    data = SOUND
    for _ in range(draw.below(4)):
        place = draw.below(65536) % len(data)
        data = data[:place] + draw.bytes(draw.below(4)) + data[place + draw.below(4) :]
    return data


def target(data: bytes) -> None:
    """Reads one file; its checksum is right, so that the contents are looked at, as often as not."""
    draw = Draw(data)
    cut, spoiled = draw.one_in(4), draw.one_in(4)
    body = payload(draw)
    file = signed(body)
    if spoiled:
        place = draw.below(65536) % len(file)
        file = file[:place] + bytes([file[place] ^ (1 + draw.below(255))]) + file[place + 1 :]
    if cut:
        file = file[: draw.below(65536) % len(file)]
    path = Path(FOLDER.name) / "checkpoint"
    path.write_bytes(file)
    try:
        state = read_checkpoint(path)
    except InputError as error:
        check_sentence(error)
        return
    assert isinstance(state, dict)
    assert not spoiled, "a changed file was read"
    assert not cut, "a truncated file was read"
