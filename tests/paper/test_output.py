"""Closed pipes and full disks: one line says so, and what can be kept is kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from utils.idx_files import write_folder

from gem_fast.paper.cli import main
from gem_fast.paper.experiments import runner

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="only Linux has /dev/full")


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Arguments of a run that takes a moment."""
    write_folder(tmp_path / "data")
    fixed = "run --learner single --tasks 3 --samples-per-task 20"
    return [*fixed.split(), "--data", str(tmp_path / "data")]


def program(arguments: list[str], **streams: object) -> subprocess.Popen[str]:
    """Runs gem_fast as a program."""
    return subprocess.Popen([sys.executable, "-m", "gem_fast", *arguments], text=True, **streams)  # type: ignore


def test_a_closed_pipe(small) -> None:
    process = program(small, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == "python -m gem_fast: the output cannot be written: it was closed\n"
    assert process.wait() == 1
    process.stderr.close()


def test_a_pipe_that_is_closed_during_training(tmp_path, small) -> None:
    out = tmp_path / "out"
    process = program([*small, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith("stream rotations")  # as `| head -1` does
    process.stdout.close()
    lines = process.stderr.read().splitlines()
    assert lines[-1] == "python -m gem_fast: the output cannot be written: it was closed"
    assert [line.partition(",")[0] for line in lines[:-1]] == [f"task {task}/3 learned" for task in (1, 2, 3)]
    assert process.wait() == 1
    process.stderr.close()
    assert (out / "result.json").exists()


@needs_full
def test_a_full_disk_behind_the_output(small) -> None:
    with FULL.open("w") as full:
        process = program(small, stdout=full, stderr=subprocess.PIPE)
    assert process.stderr.read() == "python -m gem_fast: the output cannot be written: No space left on device\n"
    assert process.wait() == 1
    process.stderr.close()


@needs_full
@pytest.mark.parametrize("stream", ["closed", "full"])
def test_nobody_reads_the_progress(small, stream) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with FULL.open("w") as full:
        process = program(small, stdout=subprocess.PIPE, stderr=full if stream == "full" else writer)
    os.close(writer)
    assert "ACC" in process.stdout.read()
    process.stdout.close()
    process.wait()


def test_a_disk_that_is_full_at_the_end(tmp_path, small) -> None:
    """No file may grow beyond 1 KB: checkpoints and pictures do not fit, and the table is printed nevertheless."""
    limited = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)); runpy.run_module"
    arguments = [*small, "--out", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "kept"), "--checkpoint-every=1"]
    finished = subprocess.run(
        [sys.executable, "-c", f"{limited}('gem_fast', run_name='__main__')", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 2
    notes = [line for line in finished.stderr.splitlines() if line.startswith("python -m gem_fast: ")]
    assert notes == [
        "python -m gem_fast: no checkpoint could be written after mini-batch 1: File too large; the run goes on",
        f"python -m gem_fast: {tmp_path / 'out' / 'r_matrix.png'} cannot be written: File too large",
    ]
    assert "ACC" in finished.stdout
    assert list((tmp_path / "out").iterdir()) == list((tmp_path / "kept").iterdir()) == []


def test_a_disk_that_is_full_anywhere_else(capsys, monkeypatch, tmp_path, small) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "some/file")

    monkeypatch.setattr(runner, "run_cached", full)
    assert main(["grid", "--quick", *small[-2:], "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "python -m gem_fast: some/file cannot be written: No space left on device\n"
