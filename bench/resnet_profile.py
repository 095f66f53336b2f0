"""Where the time of a step on the paper's ResNet18 goes at 19 past tasks and m' = 8, on a CPU.

python bench/resnet_profile.py        prints Markdown, and writes bench/results/resnet_profile.json

Compared are plain SGD, the hook after the user's own backward, `gem.step`, and `gem.step` with the pass that is fused
although the loop is what is taken by default, each with images and weights as they are and in channels_last.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from conftest import THREADS
from torch.profiler import ProfilerActivity, profile
from training import seconds_of

import gem_fast
from gem_fast.paper.models import ResNet18

RESULT = Path(__file__).parent / "results" / "resnet_profile.json"
T, MEMORY, MEMORY_BATCH, BATCH, CLASSES, ROUNDS = 19, 64, 8, 10, 100, 7

WAYS: dict[str, dict[str, Any] | None] = {
    "plain SGD": None,
    "hook": {},
    "gem.step": {},
    "gem.step, fused pass": {"engine": gem_fast.Fused(tasks_per_pass=T)},
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# The parts of a step by what the names of their operators hold; the first that fits counts.
PARTS = {
    "convolutions, backward": ("conv_backward", "convolution_backward"),
    "convolutions, forward": ("conv",),
    "batch normalisation": ("batch_norm",),
    "projection": ("gem_fast::",),
    "ReLU and the like": ("relu", "threshold", "clamp", "pool", "softmax", "nll", "mm"),
    "sums and copies of gradients": ("add", "copy_", "zero_", "fill_", "cat"),
}


def step_of(way: str, memory_format: torch.memory_format) -> Callable[[], object]:
    """One step with full memories of random images."""
    torch.manual_seed(0)
    model = ResNet18(CLASSES).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(n, 3, 32, 32).to(memory_format=memory_format)
        return x, torch.randint(CLASSES, (n,))

    def backward() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()

    x, y = batch(BATCH)
    options = WAYS[way]
    if options is None:
        return lambda: (backward(), optimizer.step())
    memory = gem_fast.EpisodicMemory(per_task=MEMORY)
    gem = gem_fast.GEM(model, optimizer, memory=memory, memory_batch=MEMORY_BATCH, **options)
    for task in range(T):
        gem.observe(*batch(MEMORY), task)
    if way == "hook":
        return lambda: (backward(), gem.observe(x, y, T), optimizer.step())
    return lambda keep=optimizer: gem.step(x, y, T)  # the hook goes when its optimizer does


def parts_of(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of the parts of a step."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        took = 1e3 * seconds_of(step)
    parts = dict.fromkeys((*PARTS, "other operators"), 0.0)
    for event in profiler.key_averages():
        fits = (part for part, names in PARTS.items() if any(name in event.key for name in names))
        parts[next(fits, "other operators")] += event.self_cpu_time_total / 1e3
    parts["Python and dispatch: the rest"] = max(0.0, took - sum(parts.values()))
    return parts


def main() -> None:
    torch.set_num_threads(THREADS)
    steps = {(way, name): step_of(way, memory_format) for way in WAYS for name, memory_format in FORMATS.items()}
    for step in steps.values():
        step(), step()  # the first pass of a kind is compared with the loop
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(ROUNDS):
        for key, step in steps.items():
            seconds[key].append(seconds_of(step))
    rows = [
        {"way": way, "format": name, "ms": 1e3 * statistics.median(seconds[way, name]), "parts": parts_of(step)}
        for (way, name), step in steps.items()
    ]
    RESULT.write_text(json.dumps({"t": T, "m": MEMORY_BATCH, "threads": THREADS, "rows": rows}, indent=1) + "\n")
    names = list(rows[0]["parts"])
    print(f"| way | format | ms | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}")
    for row in rows:
        parts = " | ".join(f"{row['parts'][name]:.0f}" for name in names)
        print(f"| {row['way']} | {row['format']} | {row['ms']:.0f} | {parts} |")


if __name__ == "__main__":
    main()
