"""Where the time of one GEM step goes at 19 past tasks, and how far its parts are from this machine's limits.

python bench/step_profile.py        prints Markdown, and writes bench/results/step_profile.json
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from conftest import THREADS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from training import BATCH, LR, MEMORY, gem, new_model

from gem_fast.paper.data import MNIST_5K, load_data
from gem_fast.paper.streams import rotations

RESULT = Path(__file__).parent / "results" / "step_profile.json"
T, STEPS, HIDDEN, PIXELS, CLASSES = 19, 100, 100, 784, 10
N = T * MEMORY

# Which operator does which part of the work; the rest is small.
PARTS = {
    "pass: all forward, and backward to the first layer's outputs": "gem_fast::_mlp_pass",
    "the first layer's gradients": "gem_fast::_layer_gradient_",
    "projection: gram, solve, combine": "gem_fast::project_",
}


def flop(density: float) -> list[float | None]:
    """Multiplications and additions by part, of the first layer those with an entry that is not zero.

    Of the projection they are not known: it forms P only where v = margin is not the answer.
    """
    first, others = PIXELS * HIDDEN * density, HIDDEN * (HIDDEN + CLASSES)
    return [2 * N * (first + 3 * others), 2 * N * first, None]


def main() -> None:
    torch.set_num_threads(THREADS)
    step, density = trained_step()
    wall = median_ms(step)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(STEPS):
            step()
    own = {event.key: event.self_cpu_time_total / 1e3 / STEPS for event in profiler.key_averages()}
    missing = PARTS.values() - own.keys()
    if missing:
        raise SystemExit(f"a step must call the operators of PARTS, got none of {sorted(missing)}")
    parts = {part: own[operator] for part, operator in PARTS.items()}
    parts["other operators (the current mini-batch, SGD)"] = sum(
        milliseconds for name, milliseconds in own.items() if "::" in name and name not in PARTS.values()
    )
    parts["Python and dispatch: the rest"] = wall - sum(parts.values())
    gflops = sgemm_gflops()
    gbytes = copy_gbytes()
    work = dict(zip(PARTS, flop(density), strict=True))
    rows = [
        {"part": part, "ms": ms, "gflops": done / ms / 1e6 if (done := work.get(part)) else None}
        for part, ms in parts.items()
    ]
    result = {"t": T, "step_ms": wall, "parts": rows, "sgemm_gflops": gflops, "copy_gbytes": gbytes}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"One step at {T} past tasks: {wall:.2f} ms; sgemm {gflops:.0f} GFLOP/s, copy {gbytes:.0f} GB/s\n")
    print("| part | ms | of the step | GFLOP/s |\n|---|---|---|---|")
    for row in rows:
        rate = "" if row["gflops"] is None else f"{row['gflops']:.0f}"
        print(f"| {row['part']} | {row['ms']:.2f} | {100 * row['ms'] / wall:.0f} % | {rate} |")


def trained_step() -> tuple[Callable[[], None], float]:
    """A step at 19 past tasks with full memories, and the part of the memory's pixels that are not zero."""
    order = torch.Generator().manual_seed(0)
    stream = rotations(load_data(MNIST_5K), T + 1, 1000, order)
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hook = gem()(model, optimizer)
    for task in range(T):
        for x, y in stream.batches(task, BATCH, 1, order):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            hook.observe(x, y, task)
            optimizer.step()
    batches: list[tuple[Tensor, Tensor]] = list(stream.batches(T, BATCH, 1, order))
    density = statistics.fmean(float((hook.memory.examples(k)[0] != 0).float().mean()) for k in range(T))
    position = 0

    def step() -> None:
        nonlocal position
        x, y = batches[position % len(batches)]
        position += 1
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        hook.observe(x, y, T)
        optimizer.step()

    return step, density


def median_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a call, median of many."""
    for _ in range(20):
        call()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def sgemm_gflops() -> float:
    """What a large dense product reaches."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    return 2 * 1536**3 / median_ms(lambda: a @ b) / 1e6


def copy_gbytes() -> float:
    """Bytes read and written per second by a copy that fits no cache."""
    a, b = torch.randn(2**25), torch.empty(2**25)
    return 2 * a.nbytes / median_ms(lambda: b.copy_(a)) / 1e6


if __name__ == "__main__":
    main()
