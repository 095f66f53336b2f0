"""Builds gem_fast's two compiled modules in one run of ninja.

gem_fast._C is one shared object for every torch from TORCH_AT_LEAST on, with or without CUDA. torch's own
BuildExtension links what ties a binary to one torch version; ours needs the stable ABI only. gem_fast._solver, the
solver for NumPy arrays, links to no torch at all. Everything else about the package is in pyproject.toml.
"""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError, PlatformError

ROOT = Path(__file__).parent
TORCH_AT_LEAST = (2, 10)
NVCC_AT_LEAST = (12, 0)  # C++20
# Compute capabilities that get machine code where TORCH_CUDA_ARCH_LIST does not say otherwise: it runs on all devices
# of the same major version. The newest one that nvcc knows of them also as PTX, which newer devices compile for
# themselves.
CUDA_ARCHITECTURES = ["8.0", "9.0", "10.0", "12.0"]

NINJA_RULES = """\
rule compile
  command = $cxx -MMD -MF $out.d $cflags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule cuda
  command = $nvcc -MMD -MF $out.d $nvccflags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared -Wl,--exclude-libs,ALL $in -o $out $libraries $ldflags
"""


@dataclass
class Nvcc:
    """The CUDA compiler, and the devices it is asked to compile for."""

    program: str
    version: str
    architectures: list[str]  # "9.0" is machine code, "9.0+PTX" both
    library_dirs: list[str]

    def __str__(self) -> str:
        return f"{', '.join(self.architectures)} (nvcc {self.version})"

    @staticmethod
    def find() -> "Nvcc | None":
        """nvcc in CUDA_HOME or on the PATH; None where there is none or GEM_FAST_CUDA=0."""
        wanted = os.environ.get("GEM_FAST_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise PlatformError(f"GEM_FAST_CUDA must be 0, 1 or not set, got '{wanted}'")
        if wanted == "0":
            return None
        home = os.environ.get("CUDA_HOME")
        program = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
        if program is None:
            if wanted == "1":
                raise PlatformError(
                    "GEM_FAST_CUDA=1 asks for CUDA kernels, and there is no nvcc "
                    f"{'in CUDA_HOME' if home else 'on the PATH'}: install the CUDA toolkit, {_dotted(NVCC_AT_LEAST)} "
                    "or newer (https://developer.nvidia.com/cuda-downloads), and name its folder in CUDA_HOME"
                )
            return None
        version = re.search(r"V(\d+\.\d+\.\d+)", _output(program, "--version"))
        if version is None or tuple(map(int, version[1].split(".")[:2])) < NVCC_AT_LEAST:
            raise PlatformError(
                f"compiling gem_fast's CUDA kernels needs nvcc {_dotted(NVCC_AT_LEAST)} or newer, got "
                f"{version[1] if version else 'an unknown version'} ({program}): install a newer CUDA toolkit, or set "
                "GEM_FAST_CUDA=0 to leave the kernels out"
            )
        libraries = re.findall(r'"-L([^"]+)"', _output(program, "--dryrun", "a.cu"))
        return Nvcc(program, version[1], _architectures(program), libraries)

    def flags(self, cxx: str) -> list[str]:
        """What every .cu file is compiled with."""
        flags = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Wno-deprecated-gpu-targets"]
        if len(shlex.split(cxx)) == 1:
            flags += ["-ccbin", cxx]
        for architecture in self.architectures:
            number, _, ptx = architecture.partition("+")
            number = number.replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if ptx:
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return [*flags, "--threads=2", f"-I{ROOT.resolve() / 'csrc'}", *shlex.split(os.environ.get("NVCCFLAGS", ""))]

    def link_flags(self) -> list[str]:
        """The CUDA runtime, statically: what is built then also loads where there is no CUDA at all."""
        return [*(f"-L{path}" for path in self.library_dirs), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def _architectures(program: str) -> list[str]:
    known = [
        f"{number[:-1]}.{number[-1]}" for number in re.findall(r"compute_(\d+)", _output(program, "--list-gpu-arch"))
    ]
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted:
        wanted = [architecture for architecture in CUDA_ARCHITECTURES if architecture in known]
        wanted[-1:] = [f"{architecture}+PTX" for architecture in wanted[-1:]]
    for architecture in wanted:
        match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", architecture)
        if match is None or match[1] not in known or float(match[1]) < 7:
            raise PlatformError(
                f"TORCH_CUDA_ARCH_LIST must list compute capabilities such as '8.0 9.0+PTX', of those from 7.0 on that "
                f"this nvcc knows ({' '.join(known)}), got '{architecture}'"
            )
    return wanted


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _output(program: str, *arguments: str) -> str:
    result = subprocess.run([program, *arguments], capture_output=True, text=True)
    return result.stdout + result.stderr


class BuildWithNinja(build_ext):
    """Compiles csrc/ with ninja and says in one sentence what is missing where it cannot."""

    def build_extensions(self) -> None:
        cxx = self._compiler()
        nvcc = Nvcc.find()
        include_dirs, library_dir = self._paths()
        build_dir = (Path(self.build_temp) / "ninja").resolve()
        build_dir.mkdir(parents=True, exist_ok=True)

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
            f'-DGEM_FAST_NVCC="{nvcc.version if nvcc else ""}"',
            f'-DGEM_FAST_CUDA_ARCHITECTURES="{" ".join(nvcc.architectures) if nvcc else ""}"',
            f'-DGEM_FAST_TORCH_AT_LEAST="{TORCH_AT_LEAST[0]}.{TORCH_AT_LEAST[1]}"',
            f"-I{ROOT.resolve() / 'csrc'}",
            *(f"-isystem {path}" for path in include_dirs),
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]
        lines = [
            f"cxx = {cxx}",
            f"cflags = {_ninja(cflags)}",
            f"ldflags = {_ninja(shlex.split(os.environ.get('LDFLAGS', '')))}",
        ]
        if nvcc:
            lines += [f"nvcc = {_path(Path(nvcc.program))}", f"nvccflags = {_ninja(nvcc.flags(cxx))}"]
        lines.append(NINJA_RULES)
        libraries = {
            "gem_fast._C": [f"-L{library_dir}", "-ltorch", "-ltorch_cpu", *(nvcc.link_flags() if nvcc else [])],
            "gem_fast._solver": [],
        }
        sources = {ext.name: [x for x in ext.sources if nvcc or "cuda" not in x] for ext in self.extensions}
        objects = {source: f"{source.replace('/', '_')}.o" for source in {x for own in sources.values() for x in own}}
        for source, out in sorted(objects.items()):
            rule = "cuda" if source.endswith(".cu") else "compile"
            lines.append(f"build {out}: {rule} {_path(ROOT.resolve() / source)}")
        for name, own in sources.items():
            target = Path(self.get_ext_fullpath(name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            lines.append(f"build {_path(target)}: link {' '.join(objects[source] for source in own)}")
            lines.append(f"  libraries = {_ninja(libraries[name])}")
        lines.append("")
        (build_dir / "build.ninja").write_text("\n".join(lines))
        print(f"gem_fast: {f'CUDA kernels for {nvcc}' if nvcc else 'no CUDA kernels, for the CPU only'}", flush=True)
        try:
            subprocess.run([_ninja_program(), "-C", str(build_dir)], check=True)
        except subprocess.CalledProcessError as error:
            raise ExecError(
                f"compiling gem_fast failed: the compiler's message stands above; {cxx} must support C++20 "
                "(GCC 11 or newer, Clang 16 or newer)"
                + (f", and nvcc {nvcc.version} must accept it (GEM_FAST_CUDA=0 leaves CUDA out)" if nvcc else "")
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


def _sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


setup(
    ext_modules=[
        Extension("gem_fast._C", _sources("torch/*.cpp", "cpu/**/*.cpp", "cuda/*.cu")),
        Extension("gem_fast._solver", _sources("numpy/*.cpp", "cpu/simd.cpp", "cpu/projection/solve.cpp")),
    ],
    cmdclass={"build_ext": BuildWithNinja},
)
