"""Checkpoint files: whole or refused, and nothing in them runs."""

import pickle
import random
from pathlib import Path

import pytest
import torch

from gem_fast.paper.errors import InputError
from gem_fast.paper.experiments.checkpoint import Checkpoints, read_checkpoint, signed

STATE = {"batches": 3, "weights": torch.arange(5.0), "rows": [(1, 0, torch.zeros(2))]}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path)


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_the_last_two_are_kept(checkpoints: Checkpoints, capsys) -> None:
    assert checkpoints.load() is None
    for batches in (9, 10, 1_000_000_000):
        checkpoints.save(batches, {**STATE, "batches": batches})
    assert names(checkpoints) == ["checkpoint-000000010.gem", "checkpoint-1000000000.gem"]
    _, state = Checkpoints(checkpoints.folder).load()
    assert state["batches"] == 1_000_000_000
    assert state["weights"].equal(STATE["weights"])
    assert capsys.readouterr().err == ""


def test_every_truncation_is_refused(checkpoints: Checkpoints) -> None:
    path = checkpoints.save(1, STATE)
    contents = path.read_bytes()
    lengths = {*range(len(signed(b"")) + 20), *range(0, len(contents), 37), *range(len(contents) - 20, len(contents))}
    for length in lengths:
        path.write_bytes(contents[:length])
        with pytest.raises(InputError, match="is truncated or corrupted"):
            read_checkpoint(path)
    path.write_bytes(contents + b"\0")
    with pytest.raises(InputError, match="is truncated or corrupted"):
        read_checkpoint(path)


def test_every_changed_bit_is_refused(checkpoints: Checkpoints) -> None:
    path = checkpoints.save(1, STATE)
    contents = path.read_bytes()
    places = [*range(len(signed(b""))), *random.Random(0).sample(range(len(contents)), 300)]
    for place in places:
        changed = bytearray(contents)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(
            InputError, match="is truncated or corrupted, or no checkpoint of this version of gem_fast"
        ) as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)
    path.write_bytes(contents)
    assert read_checkpoint(path)["batches"] == 3


def test_the_one_before_is_used_and_the_damaged_one_replaced(checkpoints: Checkpoints, capsys) -> None:
    good, bad = (checkpoints.save(batches, {**STATE, "batches": batches}) for batches in (1, 2))
    bad.write_bytes(bad.read_bytes()[:-5])
    again = Checkpoints(checkpoints.folder)
    path, state = again.load()
    assert path == good
    assert state["batches"] == 1
    assert f"{bad} is truncated" in capsys.readouterr().err
    left_by_a_kill = checkpoints.folder / "checkpoint-000000002.gem.tmp"
    left_by_a_kill.write_bytes(b"half")
    again.save(3, STATE)
    assert names(again) == ["checkpoint-000000001.gem", "checkpoint-000000003.gem"]


def test_no_sound_one(checkpoints: Checkpoints, capsys) -> None:
    for batches in (1, 2):
        checkpoints.save(batches, STATE).write_bytes(b"")
    with pytest.raises(InputError, match="has no sound checkpoint to resume from"):
        Checkpoints(checkpoints.folder).load()
    notes = capsys.readouterr().err.splitlines()
    assert ["002.gem is truncated" in notes[0], "001.gem is truncated" in notes[1]] == [True, True]


def test_a_write_that_fails_leaves_what_was_there(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(1, STATE)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(2, STATE)
    assert names(checkpoints) == ["checkpoint-000000001.gem"]


class Stranger:
    """Runs code where a pickle of it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_strangers_checkpoint_runs_no_code(checkpoints: Checkpoints, how: str) -> None:
    trace = checkpoints.folder / "code was run"
    path = checkpoints.save(1, {"learner": Stranger(trace)})
    if how == "pickle":
        path.write_bytes(signed(pickle.dumps({"learner": Stranger(trace)})))
    with pytest.raises(InputError, match="was not written by gem_fast and is not loaded") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not trace.exists()


def test_something_else_than_a_dictionary(checkpoints: Checkpoints) -> None:
    path = checkpoints.save(1, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is not loaded: it holds a list"):
        read_checkpoint(path)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_checkpoint(path)
