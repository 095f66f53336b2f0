"""The CUDA kernels, run on the CPU (tests/csrc/simt) and compared with the CPU kernels, under sanitizers.

AddressSanitizer sees accesses outside an array, in global and in shared memory; ThreadSanitizer sees accesses by two
threads that no barrier orders. That both do is tested by planting such mistakes.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from utils.build import ROOT

SIMT = ROOT / "tests" / "csrc" / "simt"
CXX = os.environ.get("CXX", "g++").split()
# Without contraction, so that the kernels and the CPU's baseline code do the same arithmetic.
FLAGS = ["-std=c++20", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-psabi", "-Wno-unknown-pragmas"]  # vector types as arguments; #pragma unroll
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}

pytestmark = pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"needs the compiler {CXX[0]}")


def run(*command: str | Path) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def compile_all(sources: list[Path], out: Path, flags: list[str], csrc: Path = ROOT / "csrc") -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    objects = [out / f"{source.parent.name}_{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        run(*CXX, *FLAGS, *flags, f"-I{csrc}", f"-I{SIMT}", "-x", "c++", "-c", source, "-o", target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    return objects


@dataclass
class Program:
    """The comparison with the kernels of one csrc/ folder, under one sanitizer."""

    path: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
        command = [str(self.path), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=env)
        if "unexpected memory mapping" in result.stderr:
            # ThreadSanitizer does not start where addresses are randomised over a wider range than it knows.
            command = ["setarch", "-R", *command]
            result = subprocess.run(command, capture_output=True, text=True, env=env)
        return result


@dataclass
class Builder:
    """Keeps what every program has in common: the CPU kernels and the emulation, without sanitizers, and the tests."""

    folder: Path
    plain: list[Path]
    objects: dict[str, dict[str, Path]]

    def build(self, sanitizer: str) -> Program:
        if sanitizer not in self.objects:
            sources = [*(ROOT / "csrc" / "cuda").glob("*.cu"), SIMT / "simt_test.cpp"]
            objects = compile_all(sources, self.folder / sanitizer, SANITIZERS[sanitizer])
            self.objects[sanitizer] = {source.name: built for source, built in zip(sources, objects, strict=True)}
        return self.link(sanitizer, self.objects[sanitizer], self.folder / sanitizer / "simt_test")

    def build_changed(self, sanitizer: str, csrc: Path, kernel: str) -> Program:
        self.build(sanitizer)
        [changed] = compile_all([csrc / "cuda" / kernel], csrc.parent / "built", SANITIZERS[sanitizer], csrc)
        return self.link(sanitizer, {**self.objects[sanitizer], kernel: changed}, csrc.parent / "simt_test")

    def link(self, sanitizer: str, objects: dict[str, Path], target: Path) -> Program:
        run(*CXX, *SANITIZERS[sanitizer], *objects.values(), *self.plain, "-o", target)
        return Program(target)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    folder = tmp_path_factory.mktemp("simt")
    sources = [*(ROOT / "csrc" / "cpu").glob("**/*.cpp"), SIMT / "simt.cpp"]
    return Builder(folder, compile_all(sources, folder / "plain", ["-O2"]), {})


@pytest.mark.parametrize(("sanitizer", "arguments"), [("address", []), ("thread", ["few"])])
def test_kernels_agree_with_the_cpu(builder: Builder, sanitizer: str, arguments: list[str]) -> None:
    result = builder.build(sanitizer).run(*arguments)
    assert result.returncode == 0, result.stderr[:5000]
    assert "checks, 0 failed" in result.stdout


@dataclass
class Mistake:
    """A change to the sources that must be caught: `text`, found once in `file`, becomes `planted`."""

    sanitizer: str
    kernel: str
    file: str
    text: str
    planted: str
    caught: str
    stage: str = ""  # of the test program; the kernel's where it has its name


MISTAKES = {
    "a missing barrier in a kernel": Mistake(
        "thread",
        "gram.cu",
        "cuda/gram.cu",
        "first + x : kLast];\n      }\n      __syncthreads();",
        "first + x : kLast];\n      }",
        "data race",
    ),
    "a missing barrier in the solver": Mistake(
        "thread",
        "solve.cu",
        "core/nnqp_factor.h",
        "z_[f] -= column(f)[c] * x; });\n        team_.barrier();",
        "z_[f] -= column(f)[c] * x; });",
        "data race",
    ),
    "a missing barrier of a warp": Mistake(
        "thread",
        "solve.cu",
        "cuda/block.h",
        "void barrier() const { __syncwarp(); }",
        "void barrier() const {}",
        "data race",
    ),
    "a missing fence before the last block": Mistake(
        "thread",
        "solve.cu",
        "cuda/block.h",
        "  __threadfence();\n  __syncthreads();",
        "  __syncthreads();",
        "data race",
        stage="project",
    ),
    "two blocks that write one place": Mistake(
        "thread",
        "gram.cu",
        "cuda/gram.cu",
        "in.write(panel.i * kRows + i, panel.j * kRows + j, slab, sum);",
        "in.write(panel.i * kRows + i, panel.j * kRows + j, 0, sum);",
        "data race",
    ),
    "a barrier that some threads pass by": Mistake(
        "address",
        "combine.cu",
        "cuda/combine.cu",
        "    if (count > 0 && terms.count > 0) {",
        "    if (count <= 0) continue;\n    if (terms.count > 0) {",
        "deadlock",
    ),
    "an element too many of a row": Mistake(
        "address",
        "gram.cu",
        "cuda/vector.h",
        "if (i < count) vector.x[i] =",
        "if (i <= count) vector.x[i] =",
        "heap-buffer-overflow",
    ),
    "an element too many of shared memory": Mistake(
        "address",
        "combine.cu",
        "cuda/combine.cu",
        "kThreads, sizeof(Terms), stream",
        "kThreads, sizeof(Terms) - 8, stream",
        "use-after-poison",
    ),
    "a vector load from an address that is not aligned": Mistake(
        "address", "pack.cu", "cuda/vector.h", "(pointer) % 16 == 0", "(pointer) % 4 == 0", "misaligned address"
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_planted_mistake_is_caught(builder: Builder, tmp_path: Path, mistake: Mistake) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    file = csrc / mistake.file
    source = file.read_text()
    assert source.count(mistake.text) == 1
    file.write_text(source.replace(mistake.text, mistake.planted))
    program = builder.build_changed(mistake.sanitizer, csrc, mistake.kernel)
    result = program.run("few", mistake.stage or mistake.kernel.removesuffix(".cu"))
    assert result.returncode != 0
    assert mistake.caught in result.stderr
