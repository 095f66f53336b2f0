"""SIGINT and SIGTERM: the mini-batch that is being learned is finished, and the run saved with it."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from utils.idx_files import write_folder
from utils.runs import assert_same, command, end_of

from gem_fast.paper.cli import main
from gem_fast.paper.experiments import protocol
from gem_fast.paper.experiments.checkpoint import Checkpoints
from gem_fast.paper.learners.baselines import Single
from gem_fast.paper.learners.gem import Gem

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_folder(folder)
    return folder


def send(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, at: int, *numbers: int) -> None:
    """Sends signals to this process in the middle of the given call of a method."""
    inner = getattr(owner, method)
    calls = 0

    def sends(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, method, sends)


def seldom(data: Path, folder: Path, *more: str) -> list[str]:
    """The command, but with a checkpoint at the end only."""
    return command(data, folder, "--checkpoint-every", "1000", *more)


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("batch", [2, 7, 20, 33, 60])
def test_the_last_mini_batch_is_saved(data, tmp_path, capsys, monkeypatch, number: int, batch: int) -> None:
    assert main(seldom(data, tmp_path / "alone")) == 0
    folder = tmp_path / "checkpoints"
    before = [signal.getsignal(number) for number in CODES]
    with monkeypatch.context() as patch:
        send(patch, Gem, "observe", batch, number)
        assert main(seldom(data, folder)) == CODES[number]
    assert [signal.getsignal(number) for number in CODES] == before
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"python -m gem_fast: interrupted: the run is saved in {folder} up to mini-batch {batch}; the same command "
        "with --resume goes on from there"
    )
    assert [path.name for path in Checkpoints(folder).paths()] == [f"checkpoint-{batch:09d}.gem"]
    torch.rand(3)
    assert main(seldom(data, folder, "--resume")) == 0
    assert_same(end_of(folder), end_of(tmp_path / "alone"))


def test_in_an_evaluation(data, tmp_path, monkeypatch) -> None:
    assert main(seldom(data, tmp_path / "alone")) == 0
    with monkeypatch.context() as patch:
        send(patch, protocol, "evaluate", 4, signal.SIGTERM)  # the baseline, 7, 14 and 20 mini-batches
        assert main(seldom(data, tmp_path / "checkpoints")) == 143
    assert end_of(tmp_path / "checkpoints")["batches"] == 20
    assert main(seldom(data, tmp_path / "checkpoints", "--resume")) == 0
    assert_same(end_of(tmp_path / "checkpoints"), end_of(tmp_path / "alone"))


@pytest.mark.parametrize(("owner", "method"), [(protocol, "evaluate"), (Gem, "observe")])
def test_the_first_mini_batch_is_saved(data, tmp_path, monkeypatch, owner, method) -> None:
    send(monkeypatch, owner, method, 1, signal.SIGTERM)
    assert main(seldom(data, tmp_path / "checkpoints")) == 143
    assert end_of(tmp_path / "checkpoints")["batches"] == 1


def test_a_second_signal_stops_at_once(data, tmp_path, capfd, monkeypatch) -> None:
    send(monkeypatch, Gem, "observe", 33, signal.SIGINT, signal.SIGTERM)
    assert main(command(data, tmp_path / "checkpoints")) == 143
    assert end_of(tmp_path / "checkpoints")["batches"] == 32
    assert "stopping after this mini-batch; press Ctrl-C again to stop at once\n" in capfd.readouterr().err


def test_an_ignored_signal_stays_ignored(data, tmp_path, monkeypatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        send(monkeypatch, Gem, "observe", 33, signal.SIGINT)
        assert main(seldom(data, tmp_path / "checkpoints")) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", CODES)
def test_in_a_run_of_a_table(data, tmp_path, capsys, monkeypatch, number: int) -> None:
    fixed = "grid --quick --learner single --lr 0.1"
    arguments = [*fixed.split(), "--data", str(data), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("gem_fast.paper.cli.grid.QUICK_SIZE", {"tasks": 3, "samples_per_task": 60})
    with monkeypatch.context() as patch:
        send(patch, Single, "observe", 8, number)
        assert main(arguments) == CODES[number]
    assert "interrupted: 0 of 1 runs are finished in" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "after 8 of 18 mini-batches" in capsys.readouterr().err
