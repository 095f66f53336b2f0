"""Checkpoints: the whole state of a run is saved at intervals, and a resumed run has the same R to the last bit.

A file is read with weights_only=True: it can hold tensors and plain values, and run no code.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from gem_fast.paper.errors import PROGRAM, InputError, flag, print_note
from gem_fast.paper.experiments.protocol import Record
from gem_fast.paper.experiments.training_run import TrainingRun
from gem_fast.paper.files import readable, write_file
from gem_fast.paper.streams import Stream

MAGIC = b"gem_fast checkpoint 3\n"
FILE_NAME = re.compile(r"checkpoint-(\d{9,})\.gem")
# Without --checkpoint-every, the fraction of the time that may be spent on saving.
MAX_TIME_FRACTION = 0.02
STOPPING = f"{PROGRAM}: stopping after this mini-batch; press Ctrl-C again to stop at once\n".encode()


def signed(payload: bytes) -> bytes:
    """The contents of a checkpoint file: MAGIC, the SHA-256 of the payload, the payload."""
    return MAGIC + hashlib.sha256(payload).digest() + payload


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what was saved in a checkpoint file.

    Raises InputError where it cannot be read, is truncated or changed in any bit, or is no checkpoint. No other
    exception comes from the contents of a file.
    """
    with readable(path):
        contents = path.read_bytes()
    payload = contents[len(signed(b"")) :]
    if contents != signed(payload):
        raise InputError(f"{path} is truncated or corrupted, or no checkpoint of this version of gem_fast")
    try:
        state = torch.load(io.BytesIO(payload), weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
    except Exception as error:  # torch and pickle raise many kinds; the file is sound but not one of ours
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path} was not written by gem_fast and is not loaded: {reason}") from error
    return state


class Checkpoints:
    """The checkpoint files in a folder, the newest and the one before, named after the mini-batches learned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._good: Path | None = None  # the file that was read or written last

    def paths(self) -> list[Path]:
        """The files, newest first."""
        numbers = {path: int(match[1]) for path in self.folder.iterdir() if (match := FILE_NAME.fullmatch(path.name))}
        return sorted(numbers, key=numbers.__getitem__, reverse=True)

    def load(self) -> tuple[Path, dict[str, Any]] | None:
        """Reads the newest sound file, and notes which are damaged: None without files, InputError where all are."""
        for path in self.paths():
            try:
                state = read_checkpoint(path)
            except InputError as error:
                print_note(f"{error}; it is not used")
            else:
                self._good = path
                return path, state
        if self.paths():
            raise InputError(f"{self.folder} has no sound checkpoint to resume from")
        return None

    def save(self, batches: int, state: dict[str, Any]) -> Path:
        """Writes a new file of tensors and plain values, then removes all others but the last good one.

        Raises OSError where it cannot be written; the files that were there still are.
        """
        payload = io.BytesIO()
        torch.save(state, payload)
        path = self.folder / f"checkpoint-{batches:09d}.gem"
        write_file(path, signed(payload.getvalue()))
        left_by_a_kill = self.folder.glob("checkpoint-*.gem.tmp")
        for other in (*self.paths(), *left_by_a_kill):
            if other not in (path, self._good):
                other.unlink(missing_ok=True)
        self._good = path
        return path


class Stopped(KeyboardInterrupt):
    """A signal has come; `number` is SIGINT or SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Checkpointer:
    """Saves checkpoints of a run into a folder of its own, and restores them.

    It is the context to train in: SIGINT and SIGTERM are then answered with a checkpoint of the mini-batch that they
    came in; for a second signal `Stopped` is raised at once. Outside of the main thread Python handles no signals, and
    the context does nothing. `saved` are the mini-batches learned at the last checkpoint, None before there is one.
    """

    def __init__(self, folder: Path, every: int | None, run: TrainingRun) -> None:
        """Prepares for a run in an existing folder; reads and writes nothing.

        There are `every` mini-batches between two checkpoints; None saves as often as MAX_TIME_FRACTION allows. A run
        that is resumed has the same configuration, but `data` and `data_root` may name another place of its examples.
        """
        self.saved: int | None = None
        self._checkpoints = Checkpoints(folder)
        self._every = every
        self._run = run
        self._fingerprint = _fingerprint(run.stream)
        self._failed = False  # whether the last save did
        self._save_seconds = 0.0  # how long the last save took
        self._last_save = time.perf_counter()  # when the last save ended
        self._signal: int | None = None  # the signal that has come
        self._handlers: dict[int, Any] = {}  # by signal, those from before this context

    def begin(self, resume: bool) -> Record | None:
        """Restores the learner and torch's global generator from the newest sound checkpoint, if it is to resume.

        Returns the run so far; None where it starts from the beginning. Raises InputError where the folder has
        checkpoints but resume is False, or where they are all damaged or of another run.
        """
        folder = self._checkpoints.folder
        if not resume:
            if self._checkpoints.paths():
                raise InputError(
                    f"--checkpoint must be a folder without checkpoints, got {str(folder)!r} with those of an earlier "
                    "run: add --resume to go on with it, or name another folder"
                )
            return None
        loaded = self._checkpoints.load()
        if loaded is None:
            print_note(f"no checkpoint in {folder} yet, so the run starts from the beginning")
            return None
        path, state = loaded
        try:
            self._check_same_run(path, state)
            self._run.learner.load_state_dict(state["learner"])
            torch.set_rng_state(state["generator"])
            record = Record.of(state["record"], state["batches"])
        except InputError:
            raise
        except Exception as error:  # torch raises many kinds for what a stranger's file can hold
            raise InputError(f"{path} does not hold a run of gem_fast: {' '.join(str(error).split())}") from error
        self.saved = record.batches
        print_note(f"resumed from {path}, after {record.batches} of {self._run.schedule.ends[-1]} mini-batches")
        return record

    def after_batch(self, record: Record) -> None:
        """Writes a checkpoint if it is time for one, and always at the end of the stream and after a signal.

        A failure, such as a full disk, is noted on stderr, once until it works again; the run goes on. Raises Stopped
        if SIGINT or SIGTERM has come.
        """
        start = time.perf_counter()
        by_time = (start - self._last_save) * MAX_TIME_FRACTION >= self._save_seconds
        save_now = by_time if self._every is None else record.batches % self._every == 0
        if save_now or self._signal is not None or record.batches == self._run.schedule.ends[-1]:
            self._save(record)
            self._last_save = time.perf_counter()
            self._save_seconds = self._last_save - start
        if self._signal is not None:
            raise Stopped(self._signal)

    def __enter__(self) -> Checkpointer:
        """Takes over both signals; one that is ignored, as SIGINT is in a background job, stays ignored."""
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self._handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
            for number in self._handlers:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise Stopped(number)
        self._signal = number
        with suppress(OSError):
            os.write(2, STOPPING)  # not print, which must not be called while it is at work itself

    def _save(self, record: Record) -> None:
        state = {
            "config": self._run.config,
            "stream": self._fingerprint,
            "learner": self._run.learner.state_dict(),
            "generator": torch.get_rng_state(),
            "batches": record.batches,
            "record": record.to_dict(),
        }
        try:
            self._checkpoints.save(record.batches, state)
            self.saved = record.batches
            self._failed = False
        except OSError as error:
            if not self._failed:
                reason = f"after mini-batch {record.batches}: {error.strerror or error}"
                print_note(f"no checkpoint could be written {reason}; the run goes on")
            self._failed = True

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        saved = state["config"]
        # Compared as texts, because the values in a stranger's file may be of any type.
        others = [
            f"{flag(name)} {saved.get(name)!s:.50} and not {value}"
            for name, value in self._run.config.items()
            if name not in ("data", "data_root") and str(saved.get(name)) != str(value)
        ]
        if others:
            raise InputError(f"--resume must come with the options of the run in {path}, which had {', '.join(others)}")
        if state["stream"] != self._fingerprint:
            raise InputError(f"--data must hold the same examples as for the run in {path}, got others")


def _fingerprint(stream: Stream) -> str:
    """SHA-256 of all examples, in order."""
    digest = hashlib.sha256()
    for tensor in stream.tensors():
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()
