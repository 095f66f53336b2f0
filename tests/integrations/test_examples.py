"""The examples run, at a reduced size, and leave a picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def output_of(command: list[str], out: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"--out={out}"], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")
    return done.stdout


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("avalanche_permuted.py", ["--experiences=2", "--examples=100"]),
        ("torchjd_multitask.py", ["--steps=30"]),
    ],
)
def test_runs(script: str, options: list[str], tmp_path: Path) -> None:
    output_of([sys.executable, str(ROOT / "examples" / script), *options], tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("start", "script"), [([sys.executable], "lightning_rotations.py"), (TORCHRUN, "distributed.py")]
)
def test_gem_keeps_more(start: list[str], script: str, tmp_path: Path) -> None:
    printed = output_of([*start, str(ROOT / "examples" / script), "--tasks=3", "--train=200"], tmp_path / "R.png")
    plain, gem = (float(line.split()[1]) for line in printed.splitlines() if line.endswith("at the end"))
    assert gem > plain
