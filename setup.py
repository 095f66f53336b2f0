"""Builds gem_fast._C: one shared object for every torch from TORCH_AT_LEAST on, compiled by ninja.

torch's own BuildExtension links what ties a binary to one torch version; ours needs the stable ABI only. Everything
else about the package is in pyproject.toml.
"""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError, PlatformError

ROOT = Path(__file__).parent
TORCH_AT_LEAST = (2, 10)

NINJA_RULES = """\
rule compile
  command = $cxx -MMD -MF $out.d $cflags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in -o $out $ldflags
"""


class BuildWithNinja(build_ext):
    """Compiles csrc/ with ninja and says in one sentence what is missing where it cannot."""

    def build_extension(self, ext: Extension) -> None:
        cxx = self._compiler()
        include_dirs, library_dir = self._paths()
        build_dir = (Path(self.build_temp) / "ninja").resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        abi = (TORCH_AT_LEAST[0] << 56) | (TORCH_AT_LEAST[1] << 48)
        cflags = [
            "-std=c++20",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            # sqrt and comparisons vectorise; results stay those of IEEE arithmetic.
            "-fno-math-errno",
            "-fno-trapping-math",
            "-Wall",
            "-Wextra",
            "-Wno-psabi",
            f"-DTORCH_TARGET_VERSION=0x{abi:016x}",
            f'-DGEM_FAST_VERSION="{self.distribution.get_version()}"',
            f'-DGEM_FAST_COMPILER="{self._compiler_version(cxx)}"',
            f'-DGEM_FAST_TORCH_AT_LEAST="{TORCH_AT_LEAST[0]}.{TORCH_AT_LEAST[1]}"',
            f"-I{ROOT.resolve() / 'csrc'}",
            *(f"-isystem {path}" for path in include_dirs),
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]
        ldflags = [f"-L{library_dir}", "-ltorch", "-ltorch_cpu", *shlex.split(os.environ.get("LDFLAGS", ""))]
        objects = {source: f"{source.replace('/', '_')}.o" for source in ext.sources}
        lines = [f"cxx = {cxx}", f"cflags = {_ninja(cflags)}", f"ldflags = {_ninja(ldflags)}", NINJA_RULES]
        lines += [f"build {out}: compile {_path(ROOT.resolve() / source)}" for source, out in objects.items()]
        lines += [f"build {_path(target)}: link {' '.join(objects.values())}", ""]
        (build_dir / "build.ninja").write_text("\n".join(lines))
        try:
            subprocess.run([_ninja_program(), "-C", str(build_dir)], check=True)
        except subprocess.CalledProcessError as error:
            raise ExecError(
                f"compiling gem_fast failed: the compiler's message stands above; {cxx} must support C++20 "
                "(GCC 11 or newer, Clang 16 or newer)"
            ) from error

    @staticmethod
    def _compiler() -> str:
        cxx = os.environ.get("CXX", "g++")
        if shutil.which(shlex.split(cxx)[0]) is None:
            raise PlatformError(
                f"compiling gem_fast needs a C++20 compiler, and '{cxx}' is not on the PATH: install one "
                "(on Debian or Ubuntu: apt install g++) or name it in CXX"
            )
        return cxx

    @staticmethod
    def _compiler_version(cxx: str) -> str:
        first_line = subprocess.run([*shlex.split(cxx), "--version"], capture_output=True, text=True).stdout
        return first_line.splitlines()[0].replace('"', "") if first_line else cxx

    @staticmethod
    def _paths() -> tuple[list[str], str]:
        try:
            import pybind11
            import torch
        except ModuleNotFoundError as error:
            raise PlatformError(
                f"compiling gem_fast needs torch and pybind11, and {error.name} is not installed: run "
                "'pip install .' to have pip bring them for the build, or install them before --no-build-isolation"
            ) from error
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if version < TORCH_AT_LEAST:
            raise PlatformError(
                f"compiling gem_fast needs torch >= {TORCH_AT_LEAST[0]}.{TORCH_AT_LEAST[1]}, got {torch.__version__}"
            )
        python_include = sysconfig.get_paths()["include"]
        if not (Path(python_include) / "Python.h").exists():
            raise PlatformError(
                f"compiling gem_fast needs Python's headers, and {python_include}/Python.h does not exist: install "
                "them (on Debian or Ubuntu: apt install python3-dev)"
            )
        torch_dir = Path(torch.__file__).parent
        # pybind11 first: torch ships a copy of its own.
        return [pybind11.get_include(), str(torch_dir / "include"), python_include], str(torch_dir / "lib")


def _ninja_program() -> str:
    try:
        from ninja import BIN_DIR
    except ModuleNotFoundError:
        program = shutil.which("ninja")
        if program is None:
            raise PlatformError("compiling gem_fast needs ninja: pip install ninja") from None
        return program
    return str(Path(BIN_DIR) / "ninja")


def _ninja(flags: list[str]) -> str:
    return " ".join(_shell(flag) for flag in flags).replace("$", "$$")


def _shell(flag: str) -> str:
    # '-isystem PATH' is one entry here and two words for the compiler.
    option, _, path = flag.partition(" ") if flag.startswith("-isystem ") else ("", "", flag)
    return f"{option} {shlex.quote(path)}".strip()


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.cpp"))

setup(ext_modules=[Extension("gem_fast._C", SOURCES)], cmdclass={"build_ext": BuildWithNinja})
