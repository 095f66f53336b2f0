"""What the compiler made of the CUDA kernels: registers, stack, spills and the instructions, per architecture.

    python bench/cuda_report.py > bench/results/cuda_report.txt

It reads the installed binary, so it needs no GPU; it needs cuobjdump, from the CUDA toolkit or from
`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.
"""

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import gem_fast

# Columns of the instruction mix: a name and what SASS calls it.
INSTRUCTIONS = {
    "FFMA": r"FFMA",
    "HMMA": r"HMMA\S*",
    "DFMA": r"DFMA",
    "DADD": r"DADD",
    "LDG.128": r"LDG\.\S*128\S*",
    "LDG": r"LDG(?!\S*128)\S*",
    "STG.128": r"STG\.\S*128\S*",
    "STG": r"STG(?!\S*128)\S*",
    "LDS.128": r"LDS\.\S*128\S*",
    "LDS": r"LDS(?!\S*128)\S*",
    "STS": r"STS\S*",
    "LD": r"LD(?:\.\S*)?",
    "ST": r"ST(?:\.\S*)?",
    "BAR": r"BAR\S*",
    "SHFL": r"SHFL\S*",
    "local": r"(?:LDL|STL)\S*",
}

NOTE = """\
regs: registers of a thread; stack: bytes of a thread's stack frame; local: bytes of static local memory. Instructions
are counted as they stand in the code, not as often as they run. LD and ST are the solver's, whose workspace is in
shared or in global memory. The last column counts loads and stores of local memory: zero means that no register was
spilled. Shared memory is dynamic, asked for at launch: gram 40 KB at most; combine 4 KB; solve 0.4 KB and, where the
device has it, the workspace of its problem (t = 20: 6 KB with P, t = 100: 47 KB, t = 200: 174 KB); pack none."""


def cuobjdump(*arguments: str) -> str:
    """The tool's output for the binary."""
    folders = [Path(sysconfig.get_paths()["purelib"], "nvidia", "cu13", "bin"), Path("/usr/local/cuda/bin")]
    program = shutil.which("cuobjdump") or next(
        (str(f / "cuobjdump") for f in folders if (f / "cuobjdump").exists()), ""
    )
    if not program:
        raise SystemExit("the report needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return subprocess.run(
        [program, *arguments, gem_fast._C.__file__], capture_output=True, text=True, check=True
    ).stdout


def kernel_name(mangled: str) -> str:
    """gram_kernel<float> of the linker's name."""
    demangled = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    match = re.search(r"(\w+_kernel)(<[^>]*>)?", demangled)
    assert match is not None, mangled
    return match[0].replace("gem_fast::", "").replace("unsigned ", "u").replace(", ", ",")


def resources(architecture: str) -> dict[str, dict[str, int]]:
    """Registers, stack and local bytes of every kernel."""
    text = cuobjdump("--dump-resource-usage", "-arch", architecture)
    found = re.findall(r"Function (_Z\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return {name: {"regs": int(regs), "stack": int(stack), "local": int(local)} for name, regs, stack, local in found}


def instructions(architecture: str) -> dict[str, Counter[str]]:
    """The instruction mix of every kernel."""
    mixes = {}
    for function in cuobjdump("-sass", "-arch", architecture).split("Function : ")[1:]:
        name, body = function.split(maxsplit=1)
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body)
        mix = Counter({"total": len(opcodes)})
        for opcode in opcodes:
            mix.update(column for column, pattern in INSTRUCTIONS.items() if re.fullmatch(pattern, opcode))
        mixes[name] = mix
    return mixes


def report() -> str:
    """The whole text."""
    info = gem_fast.build_info()
    lines = [f"CUDA kernels of gem_fast {info['version']}, nvcc {info['nvcc']}", "", NOTE]
    columns = ["total", *INSTRUCTIONS]
    for capability in info["cuda_architectures"]:
        architecture = "sm_" + capability.removesuffix("+PTX").replace(".", "")
        mixes = instructions(architecture)
        header = f"{architecture:<31}{'regs':>5}{'stack':>6}{'local':>6} |"
        lines += ["", header + "".join(f"{column:>8}" for column in columns)]
        for mangled, used in sorted(resources(architecture).items(), key=lambda item: kernel_name(item[0])):
            row = f"{kernel_name(mangled):<31}{used['regs']:>5}{used['stack']:>6}{used['local']:>6} |"
            lines.append(row + "".join(f"{mixes[mangled][column]:>8}" for column in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
