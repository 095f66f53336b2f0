"""Prints the README's tables from what `make bench` wrote: python bench/tables.py [bench/results/cpu.json]."""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "cpu.json"
TITLES = {
    "bench_project": "projection",
    "bench_solve": "solver",
    "bench_training_time": "training run",
    "bench_avalanche": "Avalanche's training run",
    "bench_upgrad_qps": "UPGrad's QPs, m",
    "bench_upgrad_weighting": "UPGrad's weighting, m",
}


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    results = json.loads(path.read_text())
    machine = results["machine_info"]
    print(
        f"{machine['cpu'].get('brand_raw', machine['processor'])}, {machine['threads']} threads, "
        f"SIMD {machine['gem_fast']['simd_in_use']}, torch {machine['gem_fast']['torch']}\n"
    )
    tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results["benchmarks"]:
        if "times_as_fast" in result["extra_info"]:
            tables[result["name"].partition("[")[0]].append(result)
    table1(tables.pop("bench_table1", []))
    for name, rows in tables.items():
        rivals = list(rows[0]["extra_info"]["times_as_fast"])
        print(f"| {TITLES.get(name, name)} | gem_fast | {' | '.join(f'than {rival}' for rival in rivals)} |")
        print("|---" * (2 + len(rivals)) + "|")
        for row in rows:
            case = ", ".join(re.findall(r"\[(.*)\]", row["name"])).replace("-", ", ") or "whole"
            ours = row["extra_info"]["median_seconds"]["ours"]
            ratios = [f"{short(ratio)}x" for ratio in row["extra_info"]["times_as_fast"].values()]
            print(f"| {case} | {duration(ours)} | {' | '.join(ratios)} |")
        print()
        for row in rows:
            if accuracies := row["extra_info"].get("mean_accuracy"):
                print(
                    f"{row['name']}: accuracy", ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items())
                )


def table1(rows: list[dict[str, Any]]) -> None:
    """Training times, and how many times that of `single` they are."""
    if not rows:
        return
    seconds = {re.findall(r"\[(.*)\]", row["name"])[0]: row["extra_info"]["median_seconds"] for row in rows}
    print(f"| training time | {' | '.join(f'{stream} | x single' for stream in seconds)} |")
    print("|---" * (1 + 2 * len(seconds)) + "|")
    for name in next(iter(seconds.values())):
        cells = [f"{duration(of[name])} | {short(of[name] / of['single'])}" for of in seconds.values()]
        print(f"| {'GEM' if name == 'ours' else name} | {' | '.join(cells)} |")
    print()


def duration(seconds: float) -> str:
    unit, length = next((x for x in (("s", 1.0), ("ms", 1e-3)) if seconds >= x[1]), ("us", 1e-6))
    return f"{short(seconds / length)} {unit}"


def short(x: float) -> str:
    """Two or three digits, without an exponent."""
    return f"{x:.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{x:.2f}"


if __name__ == "__main__":
    main()
