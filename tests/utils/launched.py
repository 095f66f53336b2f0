"""Commands that start processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def script(name: str) -> str:
    """The path of one of the scripts in this folder."""
    return str(Path(__file__).parent / f"{name}.py")


def run(command: list[str], seconds: float = 300) -> str:
    """What the command prints; it finds gem_fast and the tests' helpers. Raises if it fails."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
