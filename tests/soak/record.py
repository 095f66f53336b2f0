"""Where a soak's result is kept: one JSON file per soak, with what kind of machine it ran on and not whose."""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from utils.build import ROOT

import gem_fast

RESULTS = ROOT / "bench" / "results"


def machine() -> dict[str, object]:
    """The processor, the number of its cores and the versions that matter."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "gem_fast": gem_fast.build_info(),
    }


def write_result(name: str, result: Mapping[str, object]) -> Path:
    """Writes bench/results/<name>.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**result, "machine": machine()}, indent=2) + "\n")
    return path
