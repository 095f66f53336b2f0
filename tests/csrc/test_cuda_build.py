"""The CUDA code in the binary, and what is said when it cannot be built. Needs nvcc, but no GPU."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from utils.build import ROOT, build

import gem_fast

REPORT = ROOT / "bench" / "results" / "cuda_report.txt"
ARCHITECTURES = ["8.0", "9.0", "10.0", "12.0+PTX"]

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the PATH")


def test_missing_nvcc_is_an_error_where_cuda_is_asked_for(tmp_path: Path) -> None:
    result = build(tmp_path, {"GEM_FAST_CUDA": "1", "CUDA_HOME": str(tmp_path)})
    assert result.returncode != 0
    assert (
        "GEM_FAST_CUDA=1 asks for CUDA kernels, and there is no nvcc in CUDA_HOME: install the CUDA toolkit, 12.0 or "
        "newer" in result.stdout + result.stderr
    )


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"GEM_FAST_CUDA": "yes"}, "GEM_FAST_CUDA must be 0, 1 or not set, got 'yes'"),
        pytest.param(
            {"TORCH_CUDA_ARCH_LIST": "8.0;Hopper"},
            "TORCH_CUDA_ARCH_LIST must list compute capabilities such as '8.0 9.0+PTX'",
            marks=needs_nvcc,
        ),
        # Stopped by an option that the compiler does not know, so as not to build it all.
        pytest.param(
            {"TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX", "CXXFLAGS": "--no-such-option"},
            "gem_fast: CUDA kernels for 8.0, 9.0+PTX (nvcc ",
            marks=needs_nvcc,
        ),
        ({"GEM_FAST_CUDA": "0", "CXXFLAGS": "--no-such-option"}, "gem_fast: no CUDA kernels, for the CPU only"),
    ],
    ids=["not a switch", "not an architecture", "architectures are said", "no architectures are said"],
)
def test_build_says(tmp_path: Path, env: dict[str, str], message: str) -> None:
    result = build(tmp_path, env)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


def test_binary_holds_the_architectures_it_names() -> None:
    architectures = gem_fast.build_info()["cuda_architectures"]
    folder = Path(sysconfig.get_paths()["purelib"], "nvidia", "cu13", "bin")
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(folder))
    if not architectures or cuobjdump is None:
        pytest.skip("needs a build with CUDA and cuobjdump (pip install nvidia-cuda-cuobjdump)")
    for kind, option in (("cubin", "--list-elf"), ("ptx", "--list-ptx")):
        listed = subprocess.run([cuobjdump, option, gem_fast._C.__file__], capture_output=True, text=True).stdout
        found = set(re.findall(rf"sm_(\d+)\.{kind}", listed))
        named = {x.removesuffix("+PTX").replace(".", "") for x in architectures if kind == "cubin" or "+PTX" in x}
        assert found == named


@needs_nvcc
@pytest.mark.parametrize("kernel", ["gram", "gram_mma", "solve", "combine", "pack"])
def test_no_register_is_spilled(tmp_path: Path, kernel: str) -> None:
    source = ROOT / "csrc" / "cuda" / f"{kernel}.cu"
    flags = ["-std=c++20", "-O3", "-arch=sm_90", "-cubin", "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]
    result = subprocess.run(
        ["nvcc", *flags, str(source), "-o", str(tmp_path / "kernel.cubin")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert spills
    assert set(spills) == {("0", "0", "0")}


def test_committed_report_covers_every_architecture_and_has_no_spill() -> None:
    text = REPORT.read_text()
    for architecture in ARCHITECTURES:
        assert f"sm_{architecture.removesuffix('+PTX').replace('.', '')} " in text
    rows = re.findall(r"^\w+_kernel\S*\s+\d+\s+(\d+)\s+(\d+) \|.*\s(\d+)$", text, re.MULTILINE)
    assert len(rows) == 13 * len(ARCHITECTURES)
    assert set(rows) == {("0", "0", "0")}
