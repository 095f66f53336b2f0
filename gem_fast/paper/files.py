"""Writes files whole or not at all, even if the machine stops in the middle; says why a file cannot be read."""

import gzip
import io
import itertools
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gem_fast.paper.errors import InputError

CHUNK = 1 << 20


def prepare_folder(option: str, folder: Path) -> None:
    """Makes sure, before a long run, that files can be written into a folder; makes it if need be.

    Raises InputError, with the option of the command line that names it, if it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "probe", b"")
        (folder / "probe").unlink()
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or str(error)
        raise InputError(f"{option} must be a folder that can be written to, got {str(folder)!r}: {reason}") from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns a failure to read a file inside the block, gzip-compressed or not, into an InputError that says why."""
    try:
        yield
    except EOFError as error:
        raise InputError(f"{path} is truncated: its gzip data ends too early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is not a sound gzip file: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def read_bounded(file: io.BufferedIOBase | IO[bytes], name: object, limit: int, verb: str = "have") -> bytes:
    """Reads the rest of a file; raises InputError, with the file's name, where it has more bytes than `limit`."""
    # In chunks, because a read of n bytes may allocate n bytes first.
    contents = b"".join(itertools.islice(iter(lambda: file.read(CHUNK), b""), limit // CHUNK + 1))
    if len(contents) > limit:
        raise InputError(f"{name} must {verb} at most {limit} bytes, got more")
    return contents


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Writes files, by name, into an existing folder, as `write_file` does; raises InputError where that fails."""
    for name, contents in files.items():
        try:
            write_file(folder / name, contents)
        except OSError as error:
            raise InputError(f"{folder / name} cannot be written: {error.strerror or error}") from error


def write_file(path: Path, contents: bytes) -> None:
    """Writes a file in place of an older one of its name, which stays as it was if that fails with an OSError.

    Beside it, a file of its name and .tmp exists while this works.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The new name is on the disk only when the folder is.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
