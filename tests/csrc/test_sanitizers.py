"""The C++ part under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.

tests/csrc/native runs every kernel over random and hard shapes, at every instruction set that the processor has.
"""

import os
import shlex
import subprocess
from collections.abc import Callable

import pytest
from utils.build import ROOT

NATIVE = ROOT / "tests" / "csrc" / "native"
SOURCES = [*sorted(NATIVE.glob("*.cpp")), *sorted((ROOT / "csrc" / "cpu").glob("**/*.cpp"))]
# As setup.py compiles them, but for -O1: sanitizers ask for it, and it compiles in a third of the time.
FLAGS = "-std=c++20 -O1 -g1 -fno-math-errno -fno-trapping-math -pthread -Wall -Wextra -Werror -Wno-psabi"
SANITIZERS = {"memory": "address,undefined", "threads": "thread"}
# A short run's shapes; SANITIZER_ROUNDS=1000 makes it a long one.
ROUNDS = os.environ.get("SANITIZER_ROUNDS", "20")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(sanitizer, *arguments): the driver, built once with each sanitizer, both at the same time."""
    folder = tmp_path_factory.mktemp("sanitizers")
    include = [f"-I{ROOT / 'csrc'}", f"-I{NATIVE}"]
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    builds = [
        subprocess.Popen(
            [
                *cxx,
                *shlex.split(FLAGS),
                f"-fsanitize={checks}",
                "-fno-sanitize-recover=all",
                *include,
                *SOURCES,
                "-o",
                folder / name,
            ]
        )
        for name, checks in SANITIZERS.items()
    ]
    assert [build.wait() for build in builds] == [0, 0]

    def run(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([folder / sanitizer, *arguments], capture_output=True, text=True)

    return run


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_are_clean(run: Run, sanitizer: str) -> None:
    done = run(sanitizer, "0", ROUNDS)
    assert done.returncode == 0, done.stderr
    assert "shapes on" in done.stdout


def test_a_write_out_of_bounds_is_caught(run: Run) -> None:
    done = run("memory", "out-of-bounds")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "WRITE" in done.stderr


def test_a_race_is_caught(run: Run) -> None:
    done = run("threads", "race")
    assert done.returncode != 0
    assert "data race" in done.stderr
    assert "combine" in done.stderr
