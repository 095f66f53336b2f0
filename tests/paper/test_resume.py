"""Runs that are killed, interrupted or damaged, and go on: the same R to the last bit."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm
from utils.idx_files import write_folder
from utils.runs import assert_same, command, end_of

from gem_fast.paper.cli import main
from gem_fast.paper.experiments import checkpoint
from gem_fast.paper.experiments.checkpoint import Checkpoints, read_checkpoint
from gem_fast.paper.learners import LEARNERS, TAKE_DESCRIPTORS
from gem_fast.paper.learners.gem import Gem


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_folder(folder)
    return folder


@pytest.fixture
def uninterrupted(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    folder = tmp_path / "uninterrupted"
    assert main(command(data, folder)) == 0
    capsys.readouterr()
    end = end_of(folder)
    assert end["batches"] == 60
    return end


def interrupt(monkeypatch: pytest.MonkeyPatch, batch: int, learner: type[Any] = Gem) -> None:
    """Ctrl-C in the middle of a step, the given number of mini-batches from now."""
    observe = learner.observe
    calls = 0

    def interrupted(self: Any, x: Tensor, y: Tensor, task: int) -> None:
        nonlocal calls
        calls += 1
        observe(self, x, y, task)
        if calls == batch:
            raise KeyboardInterrupt

    monkeypatch.setattr(learner, "observe", interrupted)


@pytest.mark.parametrize("batch", [2, 20, 21, 45])
def test_ctrl_c_and_resume(data, tmp_path, capsys, monkeypatch, uninterrupted, batch: int) -> None:
    folder = tmp_path / "checkpoints"
    with monkeypatch.context() as patch:
        interrupt(patch, batch)
        assert main(command(data, folder)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"python -m gem_fast: interrupted: the run is saved in {folder} up to mini-batch {batch - 1}; the same command "
        "with --resume goes on from there"
    )
    torch.rand(3)  # whatever else the process did
    assert main(command(data, folder, "--resume")) == 0
    name = f"checkpoint-{batch - 1:09d}.gem"
    assert f"resumed from {folder / name}, after {batch - 1} of 60 mini-batches" in capsys.readouterr().err
    assert_same(end_of(folder), uninterrupted)


@pytest.mark.parametrize(
    "more",
    [
        "--shuffle-tasks --epochs 2",
        "--rounds 3",
        "--rounds 2 --shuffle-tasks --epochs 3 --batch-size 3",
        "--stream split --tasks 3 --head shared --class-order random --rounds 2",  # tasks of different sizes
        "--stream split --tasks 3 --descriptor one-hot",
        "--descriptor angle --shuffle-tasks",
    ],
)
def test_every_kind_of_schedule_resumes(data, tmp_path, capsys, monkeypatch, more: str) -> None:
    write_folder(data, n_train=37)
    arguments = command(data, tmp_path / "one", *more.split())
    if "split" in more:
        at = arguments.index("--samples-per-task")
        del arguments[at : at + 2]
    assert main(arguments) == 0
    end = end_of(tmp_path / "one")
    n = end["batches"]
    for batch in sorted({2, n // 3, n // 2 + 1, n - 1}):
        folder = tmp_path / str(batch)
        arguments[arguments.index("--checkpoint") + 1] = str(folder)
        with monkeypatch.context() as patch:
            interrupt(patch, batch)
            assert main(arguments) == 130
        assert main([*arguments, "--resume"]) == 0
        assert f"after {batch - 1} of {n} mini-batches" in capsys.readouterr().err
        assert_same(end_of(folder), end)


@pytest.mark.parametrize(
    "learner",
    [*LEARNERS, *(f"{name} --descriptor {kind}" for name in TAKE_DESCRIPTORS for kind in ("angle", "one-hot"))],
)
@pytest.mark.parametrize("batch", [2, 20, 21, 22, 45])
def test_every_learner_resumes(data, tmp_path, monkeypatch, learner: str, batch: int) -> None:
    fixed = "run --tasks 3 --samples-per-task 20 --batch-size 1 --eval-every 7 --checkpoint-every 1"
    arguments = [*fixed.split(), "--data", str(data), "--learner", *learner.split()]
    learner = learner.split()[0]
    alone, folder = tmp_path / "alone", tmp_path / "checkpoints"
    assert main([*arguments, "--checkpoint", str(alone)]) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, batch, LEARNERS[learner])
        assert main([*arguments, "--checkpoint", str(folder)]) == 130
    torch.rand(3)
    assert main([*arguments, "--checkpoint", str(folder), "--resume"]) == 0
    assert_same(end_of(folder), end_of(alone))


def test_results_of_a_resumed_run(data, tmp_path, monkeypatch) -> None:
    folder, results = tmp_path / "checkpoints", []
    assert main(command(data, tmp_path / "other", "--out", str(tmp_path / "one"))) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 33)
        assert main(command(data, folder, "--out", str(tmp_path / "two"))) == 130
    assert main(command(data, folder, "--out", str(tmp_path / "two"), "--resume")) == 0
    # A run that is complete only shows its results again.
    assert main(command(data, folder, "--out", str(tmp_path / "three"), "--resume")) == 0
    for out in ("one", "two", "three"):
        result = json.loads((tmp_path / out / "result.json").read_text())
        del result["seconds"]
        results.append(result)
    assert results[0] == results[1] == results[2]


def test_nothing_to_resume_yet(data, tmp_path, capsys, uninterrupted) -> None:
    folder = tmp_path / "checkpoints"
    assert main(command(data, folder, "--resume")) == 0
    assert f"no checkpoint in {folder} yet, so the run starts from the beginning\n" in capsys.readouterr().err
    assert_same(end_of(folder), uninterrupted)


def test_a_damaged_checkpoint(data, tmp_path, capsys, monkeypatch, uninterrupted) -> None:
    folder = tmp_path / "checkpoints"
    with monkeypatch.context() as patch:
        interrupt(patch, 40)
        main(command(data, folder))
    newest, before = Checkpoints(folder).paths()
    newest.write_bytes(newest.read_bytes()[:1000])
    capsys.readouterr()
    assert main(command(data, folder, "--resume")) == 0
    printed = capsys.readouterr().err
    assert f"{newest} is truncated or corrupted" in printed
    assert "; it is not used" in printed
    assert f"resumed from {before}, after 38 of 60" in printed
    assert_same(end_of(folder), uninterrupted)


def test_a_full_disk_stops_no_run(data, tmp_path, capsys, monkeypatch) -> None:
    def full(path: Path, contents: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_file", full)
    assert main(command(data, tmp_path / "checkpoints")) == 0
    printed = capsys.readouterr()
    assert printed.err.count("no checkpoint could be written after mini-batch") == 1
    assert "No space left on device; the run goes on" in printed.err
    assert "ACC" in printed.out


def test_the_default_interval_takes_a_small_part_of_the_time(data, tmp_path, monkeypatch) -> None:
    spent = []
    save = Checkpoints.save

    def timed(self: Checkpoints, batches: int, state: dict[str, Any]) -> Path:
        start = time.perf_counter()
        time.sleep(0.004)  # a slow disk, so that the clock's own noise does not count
        path = save(self, batches, state)
        spent.append(time.perf_counter() - start)
        return path

    monkeypatch.setattr(Checkpoints, "save", timed)
    arguments = command(data, tmp_path / "checkpoints", "--epochs", "10")
    at = arguments.index("--checkpoint-every")
    start = time.perf_counter()
    assert main([*arguments[:at], *arguments[at + 2 :]]) == 0
    # The first and the last are written in any case.
    assert len(spent) >= 2
    assert sum(spent[1:-1]) < 0.04 * (time.perf_counter() - start)


def fails(capsys, arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_options_that_do_not_fit(data, tmp_path, capsys, monkeypatch) -> None:
    folder = tmp_path / "checkpoints"
    with monkeypatch.context() as patch:
        interrupt(patch, 25)
        main(command(data, folder))
    files = {path: path.read_bytes() for path in folder.iterdir()}
    same_options = "--resume must come with the options of the run in "
    for more, message in (
        ([], "--checkpoint must be a folder without checkpoints, got"),
        (["--resume", "--lr", "0.5"], "which had --lr 0.1 and not 0.5\n"),
        (["--resume", "--lr", "0.5"], same_options),
        (["--resume", "--seed", "1", "--epochs", "2"], "which had --epochs 1 and not 2, --seed 0 and not 1\n"),
        (["--resume", "--rounds", "2"], "which had --rounds 1 and not 2\n"),
        (["--resume", "--stream", "permutations"], "which had --stream rotations and not permutations\n"),
    ):
        assert message in fails(capsys, command(data, folder, *more))
    single = command(data, folder, "--resume", "--learner", "single")
    at = single.index("--memory-per-task")
    assert "which had --learner gem and not single" in fails(capsys, single[:at] + single[at + 2 :])
    for option in (["--resume"], ["--checkpoint-every", "5"]):
        without = ["run", "--data", str(data), *option]
        assert f"{option[0]} needs --checkpoint DIR, got none" in fails(capsys, without)
    labels = data / "t10k-labels-idx1-ubyte"
    contents = labels.read_bytes()
    labels.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    assert "--data must hold the same examples as for the run in" in fails(capsys, command(data, folder, "--resume"))
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    assert "--checkpoint must be a folder that can be written to" in fails(capsys, command(data, labels))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config": {"more": 1}}, "which had --stream None and not rotations"),
        ({"config": [1]}, "does not hold a run of gem_fast: "),
        ({"config": {}}, "which had --stream None and not rotations"),
        ({"stream": torch.ones(2)}, "--data must hold the same examples"),
        ({"learner": {}}, "does not hold a run of gem_fast: .*Missing key"),
        ({"learner": 3}, "does not hold a run of gem_fast: "),
        ({"generator": torch.zeros(2)}, "does not hold a run of gem_fast: "),
        ({"record": 5}, "does not hold a run of gem_fast: "),
        ({"curves": 1}, "does not hold a run of gem_fast: "),
    ],
)
def test_a_strangers_state(data, tmp_path, capsys, monkeypatch, change: dict[str, Any], sentence: str) -> None:
    folder = tmp_path / "checkpoints"
    with monkeypatch.context() as patch:
        interrupt(patch, 25)
        main(command(data, folder, "--checkpoint-every", "24"))
    state = read_checkpoint(Checkpoints(folder).paths()[0])
    in_record = set(change) <= set(state["record"])
    state = {**state, "record": {**state["record"], **change}} if in_record else {**state, **change}
    Checkpoints(folder).save(24, state)
    printed = fails(capsys, command(data, folder, "--resume", "--checkpoint-every", "24"))
    assert re.search(sentence, printed)


# ---- SIGKILL ---------------------------------------------------------------------------------------------------------


def run_quietly(arguments: list[str]) -> None:
    tqdm.set_lock(threading.RLock())  # its own lock is one of the system's, which a killed process leaves behind
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        raise SystemExit(main(arguments))


def kill_and_resume(data: Path, folder: Path, kills: int, epochs: int) -> list[int]:
    """Kills runs at random moments, each resumed until its end, which is compared with that of a run left alone.

    Takes as many runs as the kills need; returns the number of mini-batches that were saved at each kill.
    """
    # Each process starts from a server that has imported everything, and never trained.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["gem_fast.paper.cli", "gem_fast.paper.reports.progress", "pytest", "utils.idx_files"]
    )

    def start(name: str) -> multiprocessing.process.BaseProcess:
        process = context.Process(
            target=run_quietly, args=(command(data, folder / name, "--resume", "--epochs", str(epochs)),)
        )
        process.start()
        return process

    server = context.Process(target=int)  # brings the server up, which takes longer than a run
    server.start()
    server.join()
    began = time.monotonic()
    alone = start("alone")
    alone.join()
    duration = time.monotonic() - began
    moments = random.Random(0)
    saved: list[int] = []
    run = 0
    while len(saved) < kills:
        run += 1
        ended = False
        while not ended:
            process = start(str(run))
            process.join(timeout=moments.uniform(0.0, duration) if len(saved) < kills else None)
            ended = process.exitcode is not None
            if ended:
                assert process.exitcode == 0
                assert_same(end_of(folder / str(run)), end_of(folder / "alone"))
            else:
                process.kill()
                process.join()
                loaded = Checkpoints(folder / str(run)).load() if (folder / str(run)).exists() else None
                saved.append(loaded[1]["batches"] if loaded is not None else 0)
    return saved


def test_three_kills(data, tmp_path) -> None:
    assert len(kill_and_resume(data, tmp_path / "kills", 3, epochs=2)) == 3


@pytest.mark.slow
def test_fifty_kills(data, tmp_path) -> None:
    saved = kill_and_resume(data, tmp_path / "kills", 50, epochs=5)
    print(f"mini-batches saved at each kill, of 300: {saved}")
    assert len(saved) == 50
    assert len({batches for batches in saved if 0 < batches < 300}) > 15
