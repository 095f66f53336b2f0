"""examples/trainer_lora.py at a reduced size."""

import importlib.util
import json
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "trainer_lora.py"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_trainer_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("trainer_lora", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "DOMAINS", {name: example.DOMAINS[name] for name in ("Python", "NumPy")})
    example.main(["--out", str(tmp_path), "--examples", "6", "--tokens", "12"])
    matrices = json.loads((tmp_path / "result.json").read_text())
    assert {name: [len(row) for row in rows] for name, rows in matrices.items()} == {"plain": [2, 2], "gem": [2, 2]}
    assert matrices["plain"][0] == matrices["gem"][0]  # the first domain is learned in the same way
    assert (tmp_path / "domains.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("accuracy at the end") == 2
