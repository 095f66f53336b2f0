"""How the time of each stage of the projection grows with the number of tasks t and of parameters p.

cd bench && python bench_growth.py            measures, then draws results/growth.json and results/growth.png
cd bench && python bench_growth.py --draw     draws the picture again
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import nn

import gem_fast
from gem_fast import Batch, Loop, Objective, ops, project_

RESULTS = Path(__file__).parent / "results"
THREADS = 2
P_WHILE_T_GROWS, T_WHILE_P_GROWS = 100_000, 20
TASKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
PARAMETERS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 20_000_000)
EXAMPLES = 10
SECONDS, MIN_CALLS, MAX_CALLS = 0.5, 5, 200  # per point

# Okabe and Ito's colours, told apart by readers of every colour vision; shapes tell the stages apart without them.
LOOKS = {
    "loop": ("#E69F00", "v", "loop: one backward per task"),
    "gram": ("#0072B2", "o", "gram: P = G Gᵀ, q = G g"),
    "solve": ("#D55E00", "s", "solve: the dual QP"),
    "combine": ("#009E73", "^", "combine: g + Gᵀ v"),
    "pack": ("#CC79A7", "D", "pack: one row of G"),
    "project": ("#000000", "x", "project: all in one call"),
}


def stages(t: int, p: int) -> dict[str, Callable[[], object]]:
    """A call of each stage on gradients that share a part of their direction; about half the constraints are active."""
    torch.manual_seed(0)
    G = torch.empty(t, p)
    shared = torch.randn(p)
    for row in G:
        row.copy_(torch.randn(p) + 0.3 * shared)
    parts = [p // 2, p // 4, p - p // 2 - p // 4]
    fresh = list(torch.randn(p).split(parts))
    grads = [x.clone() for x in fresh]
    P, q = ops.gram(G, fresh)
    v = ops.nnqp(P, q).v + 1e-6  # no row is skipped

    def project() -> None:
        torch._foreach_copy_(grads, fresh)
        project_(grads, G, margin=0.0)

    return {
        "loop": loop(t, p),
        "gram": lambda: ops.gram(G, fresh),
        "solve": lambda: ops.nnqp(P, q),
        "combine": lambda: ops.combine_(grads, G, v),
        "pack": lambda: ops.pack_(G[0], fresh),
        "project": project,
    }


def loop(t: int, p: int) -> Callable[[], object]:
    """G for a network of about p parameters, ten examples of every task."""
    width = int(p**0.5)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
    parameters = list(model.parameters())
    engine, objective = Loop(), Objective(model, F.cross_entropy)
    memory = [[Batch(task, torch.randn(EXAMPLES, width), torch.randint(2, (EXAMPLES,)))] for task in range(t)]
    return lambda: engine(objective, memory, parameters)


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
    """Seconds of every stage at every size."""
    torch.set_num_threads(THREADS)
    with_t, with_p = [], []
    for points, sizes in (
        (with_t, [(t, P_WHILE_T_GROWS) for t in TASKS]),
        (with_p, [(T_WHILE_P_GROWS, p) for p in PARAMETERS]),
    ):
        for t, p in sizes:
            points.append({"t": t, "p": p, "seconds": {name: median_seconds(f) for name, f in stages(t, p).items()}})
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
    left.set_ylabel("time of one call")
    reference(left, (1, 20), 6e-4, 1, "∝ t")
    reference(left, (20, 500), 1.2e-2, 2, "∝ t²")
    reference(right, (100_000, 20_000_000), 1e-2, 1, "∝ p")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Time of each stage of a GEM step, float32, {result['threads']} CPU threads")
    figure.savefig(RESULTS / "growth.png", dpi=150)


def panel(axes: Axes, points: list[dict[str, object]], size: str, label: str) -> None:
    """One line per stage."""
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
