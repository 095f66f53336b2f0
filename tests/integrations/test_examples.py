"""The examples run, at a reduced size, and draw their pictures."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("avalanche_permuted.py", ["--experiences", "2", "--examples", "100"]),
        ("torchjd_multitask.py", ["--steps", "30"]),
    ],
)
def test_example(script: str, options: list[str], tmp_path: Path):
    out = tmp_path / "picture.png"
    subprocess.run([sys.executable, EXAMPLES / script, *options, "--out", out], check=True, capture_output=True)
    assert out.read_bytes().startswith(b"\x89PNG")
