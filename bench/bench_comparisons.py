"""What it costs to compare passes with the loop: the whole training run with and without the comparisons, in turn.

    python bench/bench_comparisons.py                 prints Markdown, and writes bench/results/comparisons.json

The part of a run is the time within the comparisons over the time of that run, which a busy machine disturbs less than
the ratio of two runs. BENCH_TASKS=3 or BENCH_ROUNDS=1 make it a quick look.
"""

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conftest import THREADS
from training import TASKS, Batches, batches_of, gem, seconds_of, train

import gem_fast
from gem_fast.gradients.fused.schedule import Schedule
from gem_fast.gradients.fused.verifier import Verifier

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
RESULT = Path(__file__).parent / "results" / "comparisons.json"
MEMORY_BATCHES = (None, 8)


def with_comparisons(run: Callable[[], None]) -> tuple[float, float, int]:
    """Seconds of a run, seconds within its comparisons, and how many passes were compared."""
    spent: list[float] = []
    compare = Verifier._compare_with_loop

    def timed(*args: Any) -> None:
        spent.append(seconds_of(lambda: compare(*args)))

    with patch.object(Verifier, "_compare_with_loop", timed):
        return seconds_of(run), sum(spent), len(spent)


def without(run: Callable[[], None]) -> float:
    with patch.object(Schedule, "due", lambda *args, **options: []):
        return seconds_of(run)


def measure(batches: Batches, memory_batch: int | None) -> dict[str, float]:
    def run() -> None:
        train(batches, gem(memory_batch=memory_batch))

    train(batches[:200], gem(memory_batch=memory_batch))  # what is loaded on first use is not timed
    ratios, parts, compared = [], [], 0
    for i in range(ROUNDS):
        before = without(run) if i % 2 else None
        seconds, spent, compared = with_comparisons(run)
        ratios.append(seconds / (without(run) if before is None else before))
        parts.append(spent / seconds)
    return {"compared": compared, "part": statistics.median(parts), "with / without": statistics.median(ratios)}


def main() -> None:
    torch.set_num_threads(THREADS)
    batches = batches_of()
    print(f"| {len(batches)} steps | passes compared | part of the run | time with / without |\n|---|---|---|---|")
    results = {}
    for memory_batch in MEMORY_BATCHES:
        name = "exact" if memory_batch is None else f"m' = {memory_batch}"
        found = results[name] = measure(batches, memory_batch)
        print(
            f"| {name} | {found['compared']} | {100 * found['part']:.2f} % | {found['with / without']:.3f} |",
            flush=True,
        )
    RESULT.write_text(
        json.dumps({"tasks": TASKS, "threads": THREADS, "gem_fast": gem_fast.build_info(), "cases": results}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
