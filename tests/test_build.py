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
        assert sum(name.endswith(".so") for name in archive.namelist()) == 2
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


@pytest.mark.parametrize(
    ("use", "module", "loads"),
    [
        ("import gem_fast; gem_fast.GEM", "_C", "module does not load with torch .*"),
        ("from gem_fast import EpisodicMemory", "_C", "module does not load with torch .*"),
        ("import gem_fast; gem_fast.__version__", "_C", "module does not load with torch .*"),
        ("import gem_fast.solver", "_solver", "solver does not load"),
    ],
)
def test_failed_import_says_the_cause_and_the_fix(tmp_path: Path, use: str, module: str, loads: str) -> None:
    package = tmp_path / "gem_fast"
    package.mkdir()
    for file in ("__init__.py", "_api.py", "solver.py"):
        (package / file).write_text((ROOT / "gem_fast" / file).read_text())
    (package / f"{module}.py").write_text("raise ImportError('undefined symbol: something')")
    run = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True)
    assert re.search(
        rf"ImportError: gem_fast's compiled {loads}: undefined symbol: something; build it",
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


def test_binary_uses_the_stable_abi_only() -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", gem_fast._C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch" in symbols
    assert not re.search(r"\b(c10|at|torch)::", symbols)


def test_unknown_simd_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name must be one of build_info\(\)\['simd_levels'\], got 'sse9'"):
        gem_fast._C.set_simd_level("sse9")


def test_only_the_folder_torch_knows_torch() -> None:
    """And only the two modules know pybind11."""
    files = [path for path in (ROOT / "csrc").glob("**/*") if path.is_file()]
    assert {path.parent.name for path in files} >= {"core", "projection", "mlp", "cuda", "numpy", "torch"}
    for path in files:
        includes = re.findall(r"#include\s*[<\"](\S+)[>\"]", path.read_text())
        known = {include.split("/")[0].lower() for include in includes}
        if path.parent.name != "torch":
            assert not known & {"torch", "aten", "c10"}, path
        assert "pybind11" not in known or path.name == "module.cpp", path


def test_the_solver_imports_no_torch() -> None:
    script = """
import sys
import gem_fast.solver
assert gem_fast.solver.nnqp([[4.0]], [-2.0])[0] == 0.5
assert gem_fast.solver.Status.SOLVED == 0
assert 'torch' not in sys.modules
assert gem_fast.GEM is sys.modules['gem_fast.gem'].GEM
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    needed = subprocess.run(["ldd", gem_fast._solver.__file__], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in needed
    assert "torch" not in needed


def test_every_public_name_is_found() -> None:
    assert set(gem_fast.__all__) <= set(dir(gem_fast))
    for name in set(gem_fast.__all__) - {"MEMORY_POLICIES", "Constraint"}:  # no classes or functions
        assert getattr(gem_fast, name).__name__.split(".")[-1] == name
    with pytest.raises(AttributeError, match="module 'gem_fast' has no attribute 'nothing'"):
        _ = gem_fast.nothing


@pytest.mark.parametrize("module", ["gem", "gradients", "memory", "projection"])
def test_any_module_may_be_imported_first(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import gem_fast.{module}; import gem_fast; gem_fast.GEM"], check=True)
