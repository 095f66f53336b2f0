"""The examples run, at a reduced size, and leave a picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize(
    ("start", "script"), [([sys.executable], "lightning_rotations.py"), (TORCHRUN, "distributed.py")]
)
def test_runs(start: list[str], script: str, tmp_path: Path) -> None:
    command = [*start, str(ROOT / "examples" / script), "--tasks=3", "--train=200", f"--out={tmp_path}/R.png"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    plain, gem = (float(line.split()[1]) for line in done.stdout.splitlines() if line.endswith("at the end"))
    assert gem > plain
    assert (tmp_path / "R.png").read_bytes().startswith(b"\x89PNG")
