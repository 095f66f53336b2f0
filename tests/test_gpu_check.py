"""bench/gpu/check, by a dry run: every part runs on a CPU, and what cannot is named."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from utils.build import ROOT

CHECK = ROOT / "bench" / "gpu" / "check"
TABLES = ROOT / "bench" / "gpu" / "tables.py"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a dry run leaves, but for the build, which other tests do."""
    out = tmp_path_factory.mktemp("check")
    result = run(CHECK, out, "--dry-run", "--only", "tests,kernels,steps,sanitizer")
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def results(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return read


def test_every_part_runs(folder: Path) -> None:
    parts = results(folder)["parts"]
    assert [parts[name]["outcome"] for name in ("tests", "kernels", "steps")] == ["passed"] * 3
    assert parts["sanitizer"]["outcome"] == "skipped: needs a GPU; small shapes on the CPU: passed"
    logs = {path.name for path in folder.iterdir()}
    assert logs == {
        "results.json",
        "results.md",
        *(f"{part}.log" for part in ("tests", "kernels", "steps", "sanitizer")),
    }


def test_no_case_fails_and_all_are_there(folder: Path) -> None:
    lines = [*results(folder)["kernels"], *results(folder)["steps"]]
    assert not [line for line in lines if "error" in line]
    assert {line["case"] for line in lines} == {
        *("limits", "stages", "nnqp", "rivals", "MLP, MNIST", "ResNet18", "transformer", "transformer, LoRA")
    }


def test_the_page_has_every_section(folder: Path) -> None:
    page = (folder / "results.md").read_text()
    for section in ("Parts", "Targets", "Stages of the projection", "The solver", "Other ways", "Training steps"):
        assert f"## {section}" in page
    assert "a dry run on a CPU" in page
    assert "What failed" not in page


def test_the_readme_is_not_filled_from_a_dry_run(folder: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    refused = run(TABLES, folder / "results.json", "--readme", readme)
    assert refused.returncode != 0
    assert "must hold measurements, got those of a dry run" in refused.stderr
    assert readme.read_text() == (ROOT / "README.md").read_text()


def test_the_readme_is_filled_from_measurements(folder: Path, tmp_path: Path) -> None:
    measured = results(folder)
    measured["machine"] = {"gpu": "Some GPU", "torch": "2.11.0", "cuda": "13.0"}
    measured["kernels"].append({"case": "nnqp", "t": 20, "count": 4096, "seconds": 1e-4, "problems_per_second": 4.1e7})
    (tmp_path / "gpu.json").write_text(json.dumps(measured))
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    assert run(TABLES, tmp_path / "gpu.json", "--readme", readme).returncode == 0
    text = readme.read_text()
    assert "Some GPU, torch 2.11.0, CUDA 13.0" in text
    assert "| solver, t = 20, 4096 problems | >= 20 M per second | 41.0 M per second |" in text
    assert "not yet measured" in text  # what has no line


def test_the_readme_says_what_is_measured() -> None:
    committed = ROOT / "bench" / "results" / "gpu.json"
    sys.path.insert(0, str(TABLES.parent))
    import tables

    data = json.loads(committed.read_text()) if committed.exists() else None
    readme = (ROOT / "README.md").read_text()
    assert tables.readme_table(data) in readme


@pytest.mark.parametrize(("arguments", "message"), [(["--only", "build,nothing"], "--only must name parts of build")])
def test_wrong_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(CHECK, tmp_path / "out", *arguments)
    assert result.returncode != 0
    assert message in result.stderr
