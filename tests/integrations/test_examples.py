"""The examples run, at a reduced size, and leave a picture."""

import runpy
import sys
from pathlib import Path

import pytest
from utils.launched import TORCHRUN, run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return tmp_path / "picture.png"


def run_here(script: str, *options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has imported the frameworks already."""
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def check_gem_keeps_more(printed: str) -> None:
    plain, gem = (float(line.split()[1]) for line in printed.splitlines() if line.endswith("at the end"))
    assert gem > plain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("avalanche_permuted.py", ["--experiences=2", "--examples=100"]),
        ("torchjd_multitask.py", ["--steps=30"]),
        ("lightning_rotations.py", ["--tasks=3", "--train=200"]),
    ],
)
def test_runs(
    script: str,
    options: list[str],
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_here(script, *options, f"--out={picture}", monkeypatch=monkeypatch)
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    if script == "lightning_rotations.py":
        check_gem_keeps_more(printed)


def test_distributed_keeps_more(picture: Path) -> None:
    printed = run([*TORCHRUN, str(EXAMPLES / "distributed.py"), "--tasks=3", "--train=200", f"--out={picture}"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    check_gem_keeps_more(printed)
