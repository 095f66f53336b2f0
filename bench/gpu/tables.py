"""What bench/gpu/check measured, as a page; and the README's table.

python bench/gpu/tables.py bench/results/gpu.json                    prints the page
python bench/gpu/tables.py bench/results/gpu.json --readme README.md writes the table between its two marks
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpu: bench/gpu/tables.py writes this table -->", "<!-- gpu: end -->"
NOT_MEASURED = "not yet measured"
STAGES = ("pack", "gram", "gram, float64", "solve", "combine", "rest of project", "project")


def page(results: dict[str, Any]) -> str:
    """Everything, as Markdown."""
    sections = [
        "# gem_fast on a GPU",
        described(results["machine"]),
        "## Parts\n\n"
        + table(
            ("part", "outcome", "seconds"),
            ((name, part["outcome"], f"{part['seconds']:.0f}") for name, part in results["parts"].items()),
        ),
        "## Targets\n\n" + table(("target", "wanted", "measured", ""), targets(results)),
    ]
    kernels, steps = results.get("kernels", []), results.get("steps", [])
    sections += [
        "## Stages of the projection\n\nMicroseconds in a CUDA graph, and the floor as a part of that.\n\n"
        + table(("p", "t", "dtype", *STAGES), map(stage_row, of_case(kernels, "stages"))),
        "## The solver\n\n"
        + table(("t", "problems", "time", "problems per second"), map(nnqp_row, of_case(kernels, "nnqp"))),
        "## Other ways to project\n\nAs a training loop sees them; times as long as ours.\n\n" + rivals_table(kernels),
        "## Training steps\n\n" + steps_table(steps),
    ]
    errors = [line for line in (*kernels, *steps) if "error" in line]
    if errors:
        sections.append("## What failed\n\n" + "\n".join(f"- {json.dumps(line)}" for line in errors))
    return "\n\n".join(sections) + "\n"


def readme_table(results: dict[str, Any] | None) -> str:
    """The few figures of the README: target by target."""
    rows = targets(results or {"kernels": [], "steps": []})
    lines = table(("on a GPU", "wanted", "measured"), ((name, wanted, got) for name, wanted, got, _ in rows))
    return lines if results is None else f"{described(results['machine'])}\n\n{lines}"


def targets(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Each target with what was measured, and whether it is met."""
    kernels, steps = results.get("kernels", []), results.get("steps", [])
    stages = [line for line in of_case(kernels, "stages") if line["dtype"] == "float32"]
    small = first(line["seconds"]["project"] for line in stages if (line["p"], line["t"]) == (89_610, 19))
    shares = [line["floor_seconds"]["project"] / line["seconds"]["project"] for line in stages if line["p"] >= 10**7]
    alone, many = (
        first(line for line in of_case(kernels, "nnqp") if (line["t"], line["count"]) == (20, count))
        for count in (1, 4096)
    )
    times = {(line["case"], line["per_task"], line["t"], line["method"]): line["seconds"] for line in good(steps)}
    mlp = {name: times.get(("MLP, MNIST", 256, 19, name)) for name in ("SGD", "whole step captured, exact")}
    resnet = [
        times.get(("ResNet18", 64, 19, name))
        for name in ("published", "hook, exact, cuda_graph", "hook, exact", "step, exact")
    ]
    ours = min((x for x in resnet[1:] if x), default=None)
    captured, sgd = mlp["whole step captured, exact"], mlp["SGD"]
    return [
        target("`project_`, p = 89,610, t = 19", "<= 25 us", small, lambda x: x <= 25e-6, duration),
        target(
            "`project_`, p >= 10 M, at the least",
            ">= 80 % of the copy's bandwidth",
            min(shares, default=None),
            lambda x: x >= 0.8,
            lambda x: f"{100 * x:.0f} %",
        ),
        target("solver, t = 20, one problem", "<= 15 us", alone and alone["seconds"], lambda x: x <= 15e-6, duration),
        target(
            "solver, t = 20, 4096 problems",
            ">= 20 M per second",
            many and many["problems_per_second"],
            lambda x: x >= 2e7,
            lambda x: f"{x / 1e6:.1f} M per second",
        ),
        target(
            "exact GEM step of the MLP, t = 19, captured",
            "<= an eager SGD step",
            captured and sgd and captured / sgd,
            lambda x: x <= 1,
            lambda x: f"{x:.2f} times as long",
        ),
        target(
            "ResNet18, 64 per task, t = 19",
            ">= 5 times as fast as the published method",
            resnet[0] and ours and resnet[0] / ours,
            lambda x: x >= 5,
            lambda x: f"{x:.1f} times",
        ),
    ]


def target(name: str, wanted: str, got: Any, is_met: Any, shown: Any) -> tuple[str, str, str, str]:
    if got is None:
        return name, wanted, NOT_MEASURED, ""
    return name, wanted, shown(got), "met" if is_met(got) else "missed"


def stage_row(line: dict[str, Any]) -> list[str]:
    cells = []
    for name in STAGES:
        seconds, floor = line["seconds"].get(name), line["floor_seconds"].get(name)
        share = f" ({100 * floor / seconds:.0f} %)" if floor and seconds > 0 else ""
        cells.append(NOT_MEASURED if seconds is None else f"{1e6 * seconds:.1f}{share}")
    return [f"{line['p']:,}", str(line["t"]), line["dtype"], *cells]


def nnqp_row(line: dict[str, Any]) -> list[str]:
    return [str(line["t"]), str(line["count"]), duration(line["seconds"]), f"{line['problems_per_second']:,.0f}"]


def rivals_table(kernels: Sequence[dict[str, Any]]) -> str:
    lines = of_case(kernels, "rivals")
    names = sorted({name for line in lines for name in line["seconds"]} - {"ours"})

    def row(line: dict[str, Any]) -> list[str]:
        ours, others = line["seconds"]["ours"], line["seconds"]
        ratios = [f"{others[name] / ours:.1f}x" if name in others else "" for name in names]
        return [f"{line['p']:,}", str(line["t"]), duration(ours), *ratios]

    return table(("p", "t", "ours", *names), map(row, lines))


def steps_table(steps: Sequence[dict[str, Any]]) -> str:
    by_workload: dict[tuple[str, int, int], dict[str, float]] = defaultdict(dict)
    for line in good(steps):
        by_workload[line["case"], line["per_task"], line["t"]][line["method"]] = line["seconds"]
    names = list(dict.fromkeys(line["method"] for line in steps))
    rows = (
        [case, str(per_task), str(t), *(duration(times[name]) if name in times else "" for name in names)]
        for (case, per_task, t), times in by_workload.items()
    )
    return table(("model", "per task", "t", *names), rows)


def of_case(lines: Sequence[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    return [line for line in good(lines) if line["case"] == case]


def good(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "error" not in line]


def first(items: Iterable[Any]) -> Any:
    return next(iter(items), None)


def described(machine: dict[str, Any]) -> str:
    where = "a dry run on a CPU: no figure here means anything" if machine.get("dry_run") else machine.get("gpu", "")
    return f"{where}, torch {machine.get('torch')}, CUDA {machine.get('cuda')}"


def duration(seconds: float) -> str:
    for unit, length in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{1e6 * seconds:.3g} us"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path)
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.exists() else None
    if options.readme is None:
        print(page(results) if results else NOT_MEASURED)
        return
    if results and results["machine"].get("dry_run"):
        parser.error(f"{options.results} must hold measurements, got those of a dry run")
    before, mark, rest = options.readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        parser.error(f"{options.readme} must have the marks of the table, got none")
    options.readme.write_text(f"{before}{BEGIN}\n\n{readme_table(results)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
