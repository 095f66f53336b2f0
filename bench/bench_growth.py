"""How the time of a GEM step grows with the number of past tasks t and of parameters p.

cd bench && python bench_growth.py            measures, then draws results/growth.json and results/growth.png
cd bench && python bench_growth.py --draw     draws the picture again
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from conftest import THREADS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import nn

import gem_fast
from gem_fast import ops

RESULTS = Path(__file__).parent / "results"
P_WHILE_T_GROWS, T_WHILE_P_GROWS = 100_000, 20
TASKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
PARAMETERS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
EXAMPLES, BATCH, CLASSES = 32, 10, 10  # examples kept of each past task, and in the mini-batch
SECONDS, MIN_CALLS, MAX_CALLS = 0.5, 3, 200  # per point

WAYS: dict[str, dict[str, Any]] = {
    "loop": {"engine": gem_fast.Loop()},
    "exact": {"engine": gem_fast.Fused(form="rows")},
    "layerwise": {"engine": gem_fast.Fused(form="layerwise")},
    "sampled": {"memory_batch": 8},
}
# Okabe and Ito's colours, told apart by readers of every colour vision; shapes tell the lines apart without them.
LOOKS = {
    "loop": ("#E69F00", "v", "exact, one backward per task"),
    "exact": ("#0072B2", "o", "exact, one pass"),
    "layerwise": ("#009E73", "^", "exact, one pass, layerwise"),
    "sampled": ("#D55E00", "s", f"m' = 8 of {EXAMPLES} examples per task"),
    "sgd": ("#000000", "x", "plain SGD"),
    "gram": ("#CC79A7", "D", "P = G Gᵀ alone"),
    "solve": ("#56B4E9", "P", "the dual QP alone"),
}


def steps(t: int, p: int) -> dict[str, Callable[[], object]]:
    """For each way of making a step, what prepares it; what that returns is the step."""
    return {
        **{name: lambda options=options: gem_step(t, p, options) for name, options in WAYS.items()},
        "sgd": lambda: sgd_step(p),
        "gram": lambda: gram(t, p),
        "solve": lambda: solve(t),
    }


def new_model(p: int) -> nn.Module:
    """A network with one hidden layer, as wide as its input, and about p parameters."""
    torch.manual_seed(0)
    width = int(p**0.5)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES))


def random_batch(model: nn.Module, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, model[0].in_features), torch.randint(CLASSES, (n,))


def gem_step(t: int, p: int, options: dict[str, Any]) -> Callable[[], object]:
    """`gem.step` of a mini-batch with t past tasks in the memory."""
    model = new_model(p)
    memory = gem_fast.EpisodicMemory(per_task=EXAMPLES)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    gem = gem_fast.GEM(model, optimizer, memory=memory, **options)
    for task in range(t):
        gem.observe(*random_batch(model, EXAMPLES), task)
    x, y = random_batch(model, BATCH)

    def step(keep: torch.optim.Optimizer = optimizer) -> None:  # the hook goes when its optimizer does
        gem.step(x, y, t)

    return step


def sgd_step(p: int) -> Callable[[], object]:
    model = new_model(p)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = random_batch(model, BATCH)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def related_rows(t: int, p: int) -> torch.Tensor:
    """(t, p) gradients that share a part of their direction, so that about half of the constraints are active."""
    torch.manual_seed(0)
    shared = torch.randn(p)
    G = torch.empty(t, p)
    for row in G:
        torch.add(torch.randn(p), shared, alpha=0.3, out=row)
    return G


def gram(t: int, p: int) -> Callable[[], object]:
    G, grads = related_rows(t, p), [torch.randn(p)]
    return lambda: ops.gram(G, grads)


def solve(t: int) -> Callable[[], object]:
    P, q = ops.gram(related_rows(t, 10_000), [torch.randn(10_000)])
    return lambda: ops.nnqp(P, q)


def median_seconds(call: Callable[[], object]) -> float:
    """The median time of a call, the first one left out."""
    call()
    seconds: list[float] = []
    while len(seconds) < MIN_CALLS or (sum(seconds) < SECONDS and len(seconds) < MAX_CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure() -> dict[str, object]:
    """Seconds of a step at every size."""
    torch.set_num_threads(THREADS)
    with_t, with_p = [], []
    for points, sizes in (
        (with_t, [(t, P_WHILE_T_GROWS) for t in TASKS]),
        (with_p, [(T_WHILE_P_GROWS, p) for p in PARAMETERS]),
    ):
        for t, p in sizes:
            seconds = {}
            for name, prepare in steps(t, p).items():
                gc.collect()  # one G at a time
                seconds[name] = median_seconds(prepare())
            points.append({"t": t, "p": p, "seconds": seconds})
            print(points[-1], flush=True)
    return {
        "dtype": "float32",
        "threads": THREADS,
        "with_t": with_t,
        "with_p": with_p,
        "gem_fast": gem_fast.build_info(),
    }


def draw(result: dict[str, object]) -> None:
    """Two panels with the same time axis: growth with t, growth with p."""
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panel(left, result["with_t"], "t", f"past tasks t   (p = {P_WHILE_T_GROWS:,} parameters)")
    panel(right, result["with_p"], "p", f"parameters p   (t = {T_WHILE_P_GROWS} past tasks)")
    left.set_ylabel("time of one step")
    reference(left, (1, 20), 6e-4, 1, "∝ t")
    reference(left, (20, 500), 1.2e-2, 2, "∝ t²")
    reference(right, (100_000, 10_000_000), 1e-2, 1, "∝ p")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Time of a GEM step, float32, {result['threads']} CPU threads")
    figure.savefig(RESULTS / "growth.png", dpi=150)


def panel(axes: Axes, points: list[dict[str, object]], size: str, label: str) -> None:
    """One line per way of making a step, and of the parts that grow otherwise."""
    sizes = [point[size] for point in points]
    for name, (color, marker, text) in LOOKS.items():
        seconds = [point["seconds"][name] for point in points]
        axes.plot(sizes, seconds, color=color, marker=marker, markersize=5, linewidth=1.5, label=text)
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(EngFormatter(unit="s"))
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def reference(axes: Axes, ends: tuple[int, int], start: float, power: int, label: str) -> None:
    """A dashed line of a known slope, above the measurements."""
    x = np.array([ends[0], np.sqrt(ends[0] * ends[1]), ends[1]])
    y = start * (x / x[0]) ** power
    axes.plot(x, y, color="#777777", linestyle="--", linewidth=1)
    axes.annotate(label, (x[1], y[1]), xytext=(-4, 4), textcoords="offset points", ha="right", color="#555555")


def main() -> None:
    """Measures unless told only to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw results/growth.json again")
    path = RESULTS / "growth.json"
    if not parser.parse_args().draw:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(measure(), indent=2) + "\n")
    draw(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
