"""Checkpoint files: the newest state of a run and the one before it, checked when they are read.

A file is MAGIC, the length of what follows the header as a big-endian 64-bit unsigned integer, its SHA-256, and then
what torch.save wrote. It is read with weights_only=True: it can hold tensors and plain values, and run no code.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gem_fast.paper.errors import InputError
from gem_fast.paper.files import readable, write_file

__all__ = ["Checkpoints", "Loaded", "read_checkpoint"]

MAGIC = b"gem_fast checkpoint 1\n"
HEADER = struct.Struct(f">{len(MAGIC)}sQ32s")
FILE_NAME = re.compile(r"checkpoint-(\d{9,})\.gem")


class Loaded(NamedTuple):
    """The newest sound checkpoint of a folder."""

    path: Path
    """Its file."""
    state: dict[str, Any]
    """What was saved, of whatever form."""
    complaints: list[str]
    """A sentence about each newer file, all of them damaged."""


class Checkpoints:
    """The checkpoint files in a folder, named after the mini-batches learned: checkpoint-000000100.gem."""

    def __init__(self, folder: Path) -> None:
        """Looks at nothing yet.

        Args:
            folder: An existing folder.
        """
        self.folder = folder
        self._good: Path | None = None  # the last one that was read or written

    def paths(self) -> list[Path]:
        """The files, newest first."""
        numbers = {path: int(match[1]) for path in self.folder.iterdir() if (match := FILE_NAME.fullmatch(path.name))}
        return sorted(numbers, key=numbers.__getitem__, reverse=True)

    def load(self) -> Loaded | None:
        """Reads the newest file that is whole.

        Returns:
            What it holds; None where there are no files.

        Raises:
            InputError: There are files, and all of them are damaged.
        """
        complaints: list[str] = []
        for path in self.paths():
            try:
                state = read_checkpoint(path)
            except InputError as error:
                complaints.append(str(error))
                continue
            self._good = path
            return Loaded(path, state, complaints)
        if complaints:
            raise InputError(f"{self.folder} has no checkpoint to resume from: {'; '.join(complaints)}")
        return None

    def save(self, batches: int, state: dict[str, Any]) -> Path:
        """Writes a new file, then removes all others but the last good one.

        Args:
            batches: Mini-batches learned, more than at the last good one.
            state: Tensors and plain values, nested in dictionaries and lists.

        Returns:
            The file.

        Raises:
            OSError: It cannot be written; the files that were there still are.
        """
        payload = io.BytesIO()
        torch.save(state, payload)
        contents = payload.getvalue()
        path = self.folder / f"checkpoint-{batches:09d}.gem"
        write_file(path, HEADER.pack(MAGIC, len(contents), hashlib.sha256(contents).digest()) + contents)
        left_by_a_kill = self.folder.glob("checkpoint-*.gem.tmp")
        for other in (*self.paths(), *left_by_a_kill):
            if other not in (path, self._good):
                other.unlink(missing_ok=True)
        self._good = path
        return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads one checkpoint file.

    Args:
        path: The file.

    Returns:
        What was saved. That it is a dictionary is checked; what is in it is not.

    Raises:
        InputError: The file cannot be read, is truncated or changed in any bit, or is no checkpoint. No other exception
            comes from the contents of a file.
    """
    with readable(path):
        contents = path.read_bytes()
    if not MAGIC.startswith(contents[: len(MAGIC)]):
        raise InputError(f"{path} is not a checkpoint of this version of gem_fast")
    if len(contents) < HEADER.size:
        raise InputError(f"{path} is truncated: it ends after {len(contents)} bytes, inside its header")
    _, length, digest = HEADER.unpack_from(contents)
    payload = contents[HEADER.size :]
    if len(payload) < length:
        raise InputError(f"{path} is truncated: its header promises {length} bytes, and {len(payload)} are there")
    if len(payload) > length or hashlib.sha256(payload).digest() != digest:
        raise InputError(f"{path} is corrupted: its bytes are not those that were written")
    try:
        state = torch.load(io.BytesIO(payload), weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds; the file is sound but not one of ours
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path} was not written by gem_fast and is not loaded: {reason}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} was not written by gem_fast and is not loaded: it holds a {type(state).__name__}")
    return state
