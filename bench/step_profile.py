"""Where the time of one `gem.step` goes at 19 past tasks, and how far its parts are from this machine's limits.

python bench/step_profile.py        prints Markdown, and writes bench/results/step_profile.json
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import THREADS
from torch.profiler import ProfilerActivity, profile
from training import BATCH, LR, MEMORY, gem, new_model

from gem_fast.paper.data import MNIST_5K, load_data
from gem_fast.paper.streams import rotations

RESULT = Path(__file__).parent / "results" / "step_profile.json"
T, STEPS, HIDDEN, PIXELS, CLASSES = 19, 200, 100, 784, 10
P = PIXELS * HIDDEN + HIDDEN * HIDDEN + HIDDEN * CLASSES + 2 * HIDDEN + CLASSES
SAMPLES = (8, 32, None)


def floors(memory_batch: int | None, density: float) -> dict[str, list[tuple[float, float]]]:
    """What each operator cannot do without, of a step with violated constraints: multiply-adds, and bytes.

    Where there are several ways, each of them. Of the first layer the multiply-adds with a pixel that is not zero
    count. Of P, which steps seldom need where rows are written, none do.
    """
    n = T * (memory_batch or MEMORY)
    pixels, others = PIXELS * density, HIDDEN * (HIDDEN + CLASSES)
    first, everyone = pixels * HIDDEN, n + BATCH
    products = pixels + 4 * HIDDEN + CLASSES  # of two examples: inputs and output gradients of three layers
    alone = BATCH * (2 * first + 3 * others), 4 * P  # the mini-batch's own pass, beside one of all examples
    return {
        # Forward, backward to the layers' outputs, q from inner products; then P from these and g~ from all examples,
        # or rows that are written, and read for v and for g~.
        "_mlp_step_": [alone]
        if memory_batch is None
        else [
            (everyone * (2 * first + 3 * others) + (n / 2 + BATCH) * n * products, 8 * P),
            (everyone * (2 * first + 3 * others) + BATCH * n * products + 2 * T * P, 3 * 4 * T * P),
        ],
        "_mlp_pass": [(n * (first + 3 * others), 4 * T * (P - PIXELS * HIDDEN))],
        "_layer_gradient_": [(n * first, 4 * T * PIXELS * HIDDEN)],
        "project_": [(2 * T * P, 2 * 4 * T * P)],  # G is read for q and for g~
    }


def main() -> None:
    torch.set_num_threads(THREADS)
    gflops, gbytes = sgemm_gflops(), copy_gbytes()
    result = {"t": T, "sgemm_gflops": gflops, "copy_gbytes": gbytes, "steps": []}
    print(f"{T} past tasks, {THREADS} threads; sgemm {gflops:.0f} GFLOP/s, copy {gbytes:.0f} GB/s\n")
    print("| m' | part | ms | at least |\n|---|---|---|---|")
    for memory_batch in SAMPLES:
        step, density, _optimizer = trained_step(memory_batch)
        wall = mean_ms(step)  # as the profiler's times are means
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            for _ in range(STEPS):
                step()
        own = {event.key.removeprefix("gem_fast::"): event for event in profiler.key_averages()}
        rows = []
        for name, ways in floors(memory_batch, density).items():
            if name in own and own[name].count > STEPS // 2:  # others belong to the few steps with a comparison
                least = min(max(2 * multiply_adds / gflops, moved / gbytes) for multiply_adds, moved in ways) / 1e6
                rows.append((f"`{name}`", own[name].self_cpu_time_total / 1e3 / STEPS, least))
        ours = sum(ms for _, ms, _ in rows)
        torchs = sum(event.self_cpu_time_total for name, event in own.items() if name.startswith("aten::"))
        rows.append(("operators of torch (SGD's among them)", torchs / 1e3 / STEPS, 3 * 4 * P / gbytes / 1e6))
        rows.append(("Python and dispatch: the rest", wall - ours - torchs / 1e3 / STEPS, 0.0))
        rows.append(("**the step**", wall, sum(least for *_, least in rows)))
        for part, ms, least in rows:
            print(f"| {memory_batch or 'all'} | {part} | {ms:.3f} | {least:.3f} |")
        result["steps"].append({"memory_batch": memory_batch, "parts": rows})
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def trained_step(memory_batch: int | None) -> tuple[Callable[[], object], float, torch.optim.Optimizer]:
    """A step at 19 past tasks with full memories, the part of the memory's pixels that are not zero, and the optimizer.

    The hook keeps no reference to that.
    """
    order = torch.Generator().manual_seed(0)
    stream = rotations(load_data(MNIST_5K), T + 1, 1000, order)
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hook = gem(memory_batch=memory_batch or 8)(model, optimizer)
    for task in range(T):
        for x, y in stream.batches(task, BATCH, 1, order):
            hook.step(x, y, task)
    hook.memory_batch = memory_batch
    batches = list(stream.batches(T, BATCH, 1, order))
    density = statistics.fmean(float((hook.memory.examples(k)[0] != 0).float().mean()) for k in range(T))
    position = 0

    def step() -> None:
        nonlocal position
        hook.step(*batches[position % len(batches)], T)
        position += 1

    return step, density, optimizer


def mean_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a call, mean of many."""
    for _ in range(20):
        call()
    start = time.perf_counter()
    for _ in range(STEPS):
        call()
    return 1e3 * (time.perf_counter() - start) / STEPS


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
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    return 2 * 768**3 / median_ms(lambda: a @ b) / 1e6


def copy_gbytes() -> float:
    """Bytes read and written per second by a copy that fits no cache."""
    a, b = torch.randn(2**24), torch.empty(2**24)
    return 2 * a.nbytes / median_ms(lambda: b.copy_(a)) / 1e6


if __name__ == "__main__":
    main()
