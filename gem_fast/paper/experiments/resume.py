"""Saves the whole state of a run at intervals, and restores it when the run is resumed: the same R to the last bit."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gem_fast.paper.errors import InputError, flag, print_note
from gem_fast.paper.experiments.checkpoint import Checkpoints
from gem_fast.paper.experiments.protocol import Journal
from gem_fast.paper.experiments.signals import StopSignals
from gem_fast.paper.experiments.training_run import TrainingRun
from gem_fast.paper.streams import Stream
from gem_fast.paper.streams.schedule import Schedule
from gem_fast.state import check_count, check_keys, check_plain_tensor

__all__ = ["Checkpointer"]

# Without --checkpoint-every, the fraction of the time that may be spent on saving.
MAX_TIME_FRACTION = 0.02


class Checkpointer:
    """Saves checkpoints of a run into a folder, and restores them.

    Attributes:
        saved: Mini-batches learned at the last checkpoint; None before there is one.
        signals: The context to train in: SIGINT and SIGTERM are then answered with a checkpoint of the mini-batch that
            they came in.
    """

    def __init__(self, folder: Path, every: int | None, run: TrainingRun) -> None:
        """Prepares for a run; reads and writes nothing.

        Args:
            folder: An existing folder, for this run alone.
            every: Mini-batches between two checkpoints; None saves as often as MAX_TIME_FRACTION allows.
            run: The run. To resume it, its configuration must be the same, but `data` and `data_root` may name
                another place of the same examples.
        """
        self.saved: int | None = None
        self.signals = StopSignals()
        self._checkpoints = Checkpoints(folder)
        self._every = every
        self._config = run.config
        self._fingerprint = _fingerprint(run.stream)
        self._n_tasks = run.stream.n_tasks
        self._device = run.stream.device
        self._learner = run.learner
        self._schedule = run.schedule
        self._failed = False  # the last save
        self._save_seconds = 0.0  # the last save took
        self._last_save = time.perf_counter()  # its end

    def begin(self, resume: bool) -> Journal | None:
        """Restores the learner and torch's global generators from the newest sound checkpoint.

        Args:
            resume: Whether to go on from it; otherwise a new run begins, in a folder without checkpoints.

        Returns:
            The run so far; None at the beginning.

        Raises:
            InputError: The folder has checkpoints but resume is False, or they are all damaged, or of another run.
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
        for complaint in loaded.complaints:
            print_note(f"{complaint}; the one before it is used")
        self._check_same_run(loaded.path, loaded.state)
        try:
            journal = _journal_of_state(loaded.state["journal"], self._n_tasks, self._schedule)
            self._learner.load_state_dict(loaded.state["learner"])
            self._set_generators(loaded.state["generators"])
        except ValueError as error:
            raise InputError(f"{loaded.path} does not hold a run of gem_fast: {error}") from error
        self.saved = journal.batches
        print_note(f"resumed from {loaded.path}, after {journal.batches} of {self._schedule.n_batches} mini-batches")
        return journal

    def after_batch(self, journal: Journal) -> None:
        """Writes a checkpoint if it is time for one, and always at the end of the stream and after a signal.

        A failure, such as a full disk, is noted on stderr, once until it works again; the run goes on.

        Args:
            journal: The run so far.

        Raises:
            Stopped: SIGINT or SIGTERM has come.
        """
        start = time.perf_counter()
        if self._every is None:
            save_now = (start - self._last_save) * MAX_TIME_FRACTION >= self._save_seconds
        else:
            save_now = journal.batches % self._every == 0
        if save_now or self.signals.asked or journal.batches == self._schedule.n_batches:
            self._save(journal)
            self._last_save = time.perf_counter()
            self._save_seconds = self._last_save - start
        self.signals.can_wait = True
        self.signals.stop_if_asked()

    def _save(self, journal: Journal) -> None:
        try:
            self._checkpoints.save(journal.batches, self._state(journal))
            self.saved = journal.batches
            self._failed = False
        except OSError as error:
            if not self._failed:
                reason = error.strerror or error
                print_note(
                    f"no checkpoint could be written after mini-batch {journal.batches}: {reason}; the run goes on"
                )
            self._failed = True

    def _state(self, journal: Journal) -> dict[str, Any]:
        return {
            "config": self._config,
            "stream": self._fingerprint,
            "learner": self._learner.state_dict(),
            "generators": self._generators(),
            "journal": {
                "baseline": torch.from_numpy(journal.baseline),
                "batches": journal.batches,
                "rows": [(batches, task, torch.from_numpy(accuracy)) for batches, task, accuracy in journal.rows],
                "train_seconds": journal.train_seconds,
                "eval_seconds": journal.eval_seconds,
            },
        }

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        try:
            check_keys("a checkpoint", state, ("config", "stream", "learner", "generators", "journal"))
            check_keys("journal", state["journal"], ("baseline", "batches", "rows", "train_seconds", "eval_seconds"))
            if not isinstance(state["config"], dict):
                raise ValueError(f"config must be a dictionary, got {type(state['config']).__name__}")
        except ValueError as error:
            raise InputError(f"{path} does not hold a run of gem_fast: {error}") from error
        saved = state["config"]
        # Compared as texts, because the values in a stranger's file may be of any type.
        others = [
            f"{flag(name)} {saved.get(name)!s:.50} and not {value}"
            for name, value in self._config.items()
            if name not in ("data", "data_root") and str(saved.get(name)) != str(value)
        ]
        if others:
            raise InputError(f"--resume must come with the options of the run in {path}, which had {', '.join(others)}")
        if state["stream"] != self._fingerprint:
            raise InputError(f"--data must hold the same examples as for the run in {path}, got others")

    def _generators(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._device.type != "cpu":
            states[self._device.type] = torch.get_device_module(self._device).get_rng_state(self._device)
        return states

    def _set_generators(self, states: Any) -> None:
        check_keys("generators", states, tuple(self._generators()))
        try:
            torch.set_rng_state(states["cpu"])
            if self._device.type != "cpu":
                torch.get_device_module(self._device).set_rng_state(states[self._device.type], self._device)
        except (TypeError, RuntimeError) as error:
            raise ValueError("generators must be the states of torch's global generators, got other values") from error


def _journal_of_state(state: dict[str, Any], n_tasks: int, schedule: Schedule) -> Journal:
    check_count("batches", state["batches"], 1, schedule.n_batches)
    for name in ("train_seconds", "eval_seconds"):
        if type(state[name]) is not float:
            raise ValueError(f"{name} must be a float, got {type(state[name]).__name__}")
    if not isinstance(state["rows"], list):
        raise ValueError(f"rows must be a list, got {type(state['rows']).__name__}")
    rows: list[tuple[int, int, npt.NDArray[np.float64]]] = []
    for row in state["rows"]:
        if not isinstance(row, tuple) or len(row) != 3:
            raise ValueError("rows must hold the mini-batches, the task and the accuracies each, got another row")
        check_count("the mini-batches of a row", row[0], rows[-1][0] + 1 if rows else 1, state["batches"])
        task = schedule.experiences[schedule.experience_of(row[0])].task
        check_count("the task of a row", row[1], task, task)
        rows.append((row[0], task, _accuracies("a row", row[2], n_tasks)))
    # R is made of the rows at the ends of experiences.
    ends = [end for end in schedule.ends if end <= state["batches"]]
    if not {row[0] for row in rows}.issuperset(ends):
        raise ValueError(f"rows must have one after each of the {len(ends)} experiences so far, got {len(rows)} others")
    baseline = _accuracies("baseline", state["baseline"], n_tasks)
    return Journal(baseline, state["batches"], rows, state["train_seconds"], state["eval_seconds"])


def _accuracies(name: str, value: Any, n_tasks: int) -> npt.NDArray[np.float64]:
    check_plain_tensor(name, value)
    if value.shape != (n_tasks,) or value.dtype != torch.float64:
        raise ValueError(f"{name} must have shape ({n_tasks},), float64, got {tuple(value.shape)}, {value.dtype}")
    accuracies: npt.NDArray[np.float64] = value.detach().cpu().numpy()
    return accuracies


def _fingerprint(stream: Stream) -> str:
    """SHA-256 of all examples, in order."""
    digest = hashlib.sha256()
    for tensor in stream.tensors():
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()
