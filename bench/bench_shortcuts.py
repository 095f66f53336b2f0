"""What each shortcut for an MLP on a CPU gains: the whole training run with and without it, in turn.

    python bench/bench_shortcuts.py                   prints Markdown, and writes bench/results/shortcuts.json
    python bench/bench_shortcuts.py --against PATH    compares with another checkout, whose module is built, instead

The table has the time without a shortcut divided by the time with it, the median of the ratios round by round: above 1
the shortcut gains. Against another checkout it has this one's median time divided by the other's: below 1 this one is
faster. BENCH_TASKS=3 or BENCH_ROUNDS=1 make it a quick look.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
import training
from conftest import THREADS
from torch import Tensor, nn
from training import TASKS, batches_of, gem, new_model, seconds_of, train

import gem_fast
from gem_fast.gradients import cpu_mlp
from gem_fast.gradients.fused.entries import TaskEntries

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
RESULT = Path(__file__).parent / "results" / "shortcuts.json"


class Case(NamedTuple):
    """A training run; without `memory_batch` it is the exact one."""

    stream: str
    memory_batch: int | None = None

    def __str__(self) -> str:
        kind = "exact" if self.memory_batch is None else f"m' = {self.memory_batch}"
        return f"{self.stream}, {kind}"


CASES = (Case("rotations"), Case("permutations"), Case("rotations", 8), Case("rotations", 32))


class SubclassedMlp(nn.Module):
    """The same network as a module with a forward of its own, which only the recorded pass recognises."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer for layer in network if isinstance(layer, nn.Linear))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


class Variant(NamedTuple):
    """A way to run: the model, what of the library is replaced by a function that returns None, and Fused's options."""

    model: Callable[[], nn.Module]
    replaced: tuple[tuple[Any, str], ...] = ()
    shortcuts: bool = True

    def seconds(self, case: Case, batches: training.Batches) -> float:
        model = self.model()
        with ExitStack() as stack:
            for owner, name in self.replaced:
                stack.enter_context(patch.object(owner, name, staticmethod(lambda *args: None)))
            engine = gem_fast.Fused(shortcuts=self.shortcuts)
            return seconds_of(lambda: train(batches, gem(memory_batch=case.memory_batch, engine=engine), model))


def subclassed_mlp() -> nn.Module:
    return SubclassedMlp(new_model())


ENTRIES = (TaskEntries, "of")
ALL = "nn.Sequential, all shortcuts"
SUBCLASSED = "another module, all shortcuts"
# With everything, and then without one thing at a time or several; the time of each is divided by that of its base.
VARIANTS = {
    ALL: Variant(new_model),
    "the whole pass": Variant(new_model, ((cpu_mlp, "whole_pass"),)),
    "both passes: Fused(shortcuts=False)": Variant(new_model, shortcuts=False),
    "sparse entries": Variant(new_model, (ENTRIES,)),
    "all of them": Variant(new_model, (ENTRIES,), shortcuts=False),
    SUBCLASSED: Variant(subclassed_mlp),
    "the recorded pass, of another module than nn.Sequential": Variant(subclassed_mlp, ((cpu_mlp, "recorded_pass"),)),
}
BASES = {name: SUBCLASSED if variant.model is subclassed_mlp else ALL for name, variant in VARIANTS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout to compare with")
    against = parser.parse_args().against
    if against is None:
        measure_shortcuts()
    else:
        compare(Path(__file__).resolve().parents[1], against.resolve())


def measure_shortcuts() -> None:
    """All variants in turn, round by round, each round starting with another one."""
    torch.set_num_threads(THREADS)
    results = []
    for case in CASES:
        batches = batches_of(case.stream)
        VARIANTS[ALL].seconds(case, batches[:200])  # what is loaded on first use is not timed
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        names = list(VARIANTS)
        for i in range(ROUNDS):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                seconds[name].append(VARIANTS[name].seconds(case, batches))
        ratios = {
            name: statistics.median(mine / base for mine, base in zip(seconds[name], seconds[base], strict=True))
            for name, base in BASES.items()
            if name != base
        }
        results.append({**case._asdict(), "seconds": seconds, "ratios": ratios})
        print(f"{case}: {ratios}", file=sys.stderr, flush=True)
    result = {"tasks": TASKS, "threads": THREADS, "gem_fast": gem_fast.build_info(), "cases": results}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print_table("time without / with", results[0]["ratios"], [of["ratios"] for of in results])
    for name in (ALL, SUBCLASSED):
        print(row(f"{name}: seconds", [statistics.median(of["seconds"][name]) for of in results]))


def compare(mine: Path, other: Path) -> None:
    """Pairs of runs, one of each checkout, each in a process of its own; the first of a pair is each in turn."""
    columns = []
    for case in CASES:
        seconds: dict[Path, list[float]] = {mine: [], other: []}
        for i in range(ROUNDS):
            for checkout in (mine, other) if i % 2 == 0 else (other, mine):
                seconds[checkout].append(seconds_in(checkout, case))
        medians = [statistics.median(of) for of in seconds.values()]
        columns.append(
            {
                "this checkout: seconds": medians[0],
                "the other: seconds": medians[1],
                "this / the other": medians[0] / medians[1],
            }
        )
        print(f"{case}: {columns[-1]}", file=sys.stderr, flush=True)
    print_table(f"{ROUNDS} pairs, medians", columns[0], columns)


def seconds_in(checkout: Path, case: Case) -> float:
    """One run of a checkout's gem_fast."""
    command = [sys.executable, training.__file__, case.stream]
    if case.memory_batch is not None:
        command.append(str(case.memory_batch))
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)
    if not Path(result["gem_fast"]).is_relative_to(checkout):
        raise SystemExit(f"gem_fast must be imported from {checkout}, got {result['gem_fast']}")
    return result["seconds"]


def print_table(title: str, names: dict[str, float], columns: list[dict[str, float]]) -> None:
    print(f"| {title} | {' | '.join(map(str, CASES))} |")
    print("|---" * (1 + len(CASES)) + "|")
    for name in names:
        print(row(name, [column[name] for column in columns]))


def row(name: str, figures: list[float]) -> str:
    return f"| {name} | {' | '.join(f'{x:.2f}' for x in figures)} |"


if __name__ == "__main__":
    main()
