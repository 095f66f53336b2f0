"""The compiled part: what it is made of, how it is built, and what is said when it cannot be."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from utils.build import ROOT, build

import gem_fast


def test_builds_without_isolation_and_imports_from_the_wheel(tmp_path: Path) -> None:
    result = build(tmp_path, {"GEM_FAST_CUDA": "0"})
    assert result.returncode == 0, result.stdout + result.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert sum(name.endswith(".so") for name in archive.namelist()) == 1
        assert "gem_fast/py.typed" in archive.namelist()
        archive.extractall(tmp_path / "site")
    script = "import gem_fast; print(gem_fast.__file__, gem_fast.build_info()['cuda_architectures'])"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    assert str(tmp_path) in run.stdout
    assert run.stdout.endswith(" []\n")


def test_missing_compiler_is_named(tmp_path: Path) -> None:
    result = build(tmp_path, {"CXX": "no-such-compiler"})
    assert result.returncode != 0
    assert "compiling gem_fast needs a C++20 compiler, and 'no-such-compiler' is not on the PATH: install one" in (
        result.stdout + result.stderr
    )


def test_failed_import_says_the_cause_and_the_fix(tmp_path: Path) -> None:
    package = tmp_path / "gem_fast"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "gem_fast" / "__init__.py").read_text())
    (package / "_C.py").write_text("raise ImportError('undefined symbol: something')")
    run = subprocess.run([sys.executable, "-c", "import gem_fast"], cwd=tmp_path, capture_output=True, text=True)
    assert re.search(
        r"ImportError: gem_fast's compiled module does not load with torch .*: undefined symbol: something; build it",
        run.stderr,
    )


def test_build_info() -> None:
    info = gem_fast.build_info()
    assert info["torch"] == torch.__version__
    assert info["torch_at_least"] == "2.10"
    assert info["simd_in_use"] == info["simd_levels"][-1]
    assert info["simd_levels"][0] == "baseline"
    assert gem_fast.__version__ == info["version"]
    assert set(info) >= {"compiler", "torch_built_with", "pybind11", "cuda_architectures"}


@pytest.mark.parametrize("folder", ["core", "cpu"])
def test_kernels_know_no_tensor_library(folder: str) -> None:
    for path in (ROOT / "csrc" / folder).glob("**/*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10|pybind11)", path.read_text()), path


def test_binary_uses_the_stable_abi_only() -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", gem_fast._C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch" in symbols
    assert not re.search(r"\b(c10|at|torch)::", symbols)


def test_unknown_simd_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name must be one of build_info\(\)\['simd_levels'\], got 'sse9'"):
        gem_fast._C.set_simd_level("sse9")


def test_kernels_know_no_torch() -> None:
    files = [path for folder in ("core", "cpu", "cuda") for path in (ROOT / "csrc" / folder).iterdir()]
    assert len(files) > 20
    for path in files:
        assert not re.search(r"#include .*(torch|aten|c10)", path.read_text(), re.IGNORECASE), path
