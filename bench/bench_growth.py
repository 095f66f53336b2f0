"""How the time and memory of a GEM step grow with the number of past tasks t and of parameters p.

cd bench && python bench_growth.py            measures, then draws results/growth.json and results/growth.png
cd bench && python bench_growth.py --draw     draws what results/growth.json has

Each way to make a step has a process of its own at each size, so that its peak memory is seen, and results are written
after each size. A way that takes more memory than is free is left out, and the results say why.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from conftest import THREADS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import Tensor, nn

import gem_fast
from gem_fast import ops
from gem_fast.paper.data import MNIST_5K, load_data

RESULTS = Path(__file__).parent / "results"
P_WHILE_T_GROWS, T_WHILE_P_GROWS = 100_000, 20
TASKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
PARAMETERS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
EXAMPLES, BATCH, CLASSES = 32, 10, 10  # examples kept of each past task, and in the mini-batch
# Per way and size; the first call compares each task's gradient.
WARM_UP, SECONDS, MIN_CALLS, MAX_CALLS = 2, 0.5, 3, 200
MOST_SECONDS = 900.0  # that a way may take at one size, with all that comes before

WAYS: dict[str, dict[str, Any]] = {
    "loop": {"engine": gem_fast.Loop()},
    "exact": {"engine": gem_fast.Fused(form="rows")},
    "layerwise": {"engine": gem_fast.Fused(form="layerwise")},
    "sampled": {"memory_batch": 8},
}
# What a way takes beside torch itself: t rows of p numbers or none, and so many vectors of p.
ROWS = {"loop": True, "exact": True, "layerwise": False, "sampled": False, "sgd": False, "gram": True, "solve": False}
VECTORS, TORCH_BYTES = 8, 2**29
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


class Tasks:
    """Digits, each task with a permutation of the pixels of its own, of a resolution that goes with p parameters.

    The network has one hidden layer, as wide as its input.
    """

    def __init__(self, p: int) -> None:
        torch.manual_seed(0)
        data, side = load_data(MNIST_5K), round(p**0.25)
        self._images = F.interpolate(data.train_images[:, None] / 255.0, size=(side, side), mode="area").flatten(1)
        self._labels = data.train_labels
        width = side**2
        self.learning_rate = min(0.1, 10 / width)
        self.model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES))

    def batch(self, task: int, n: int) -> tuple[Tensor, Tensor]:
        """Some examples of a task, drawn anew."""
        order = torch.randperm(self._images.shape[1], generator=torch.Generator().manual_seed(task))
        chosen = torch.randint(len(self._images), (n,))
        return self._images[chosen][:, order], self._labels[chosen]


def gem_step(t: int, p: int, options: dict[str, Any]) -> Callable[[], object]:
    """`gem.step` of a new mini-batch each time, with t past tasks in the memory, on which the network was trained."""
    tasks = Tasks(p)
    model, memory = tasks.model, gem_fast.EpisodicMemory(per_task=EXAMPLES)
    for task in range(t):
        train(tasks, task, torch.optim.SGD(model.parameters(), lr=tasks.learning_rate))
        memory.observe(*tasks.batch(task, EXAMPLES), task)
    optimizer = torch.optim.SGD(model.parameters(), lr=tasks.learning_rate)
    gem = gem_fast.GEM(model, optimizer, memory=memory, **options)

    def step(keep: torch.optim.Optimizer = optimizer) -> None:  # the hook goes when its optimizer does
        gem.step(*tasks.batch(t, BATCH), t)

    return step


def sgd_step(p: int) -> Callable[[], object]:
    tasks = Tasks(p)
    optimizer = torch.optim.SGD(tasks.model.parameters(), lr=tasks.learning_rate)
    return lambda: train(tasks, 0, optimizer)


def train(tasks: Tasks, task: int, optimizer: torch.optim.Optimizer) -> None:
    """One step of plain SGD."""
    x, y = tasks.batch(task, BATCH)
    optimizer.zero_grad()
    F.cross_entropy(tasks.model(x), y).backward()
    optimizer.step()


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
    """The median time of a call, the first ones left out; of a long one fewer are made."""
    for _ in range(WARM_UP):
        call()
    seconds: list[float] = []
    while len(seconds) < MIN_CALLS or (sum(seconds) < SECONDS and len(seconds) < MAX_CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_here(way: str, t: int, p: int) -> dict[str, float]:
    """Seconds of a step, and the most memory that the process has had."""
    torch.set_num_threads(THREADS)
    seconds = median_seconds(steps(t, p)[way]())
    return {"seconds": seconds, "peak_bytes": kilobytes("/proc/self/status", "VmHWM") * 1024}


def measure_in_a_process(way: str, t: int, p: int) -> dict[str, float] | str:
    """The same, or why there is nothing to measure."""
    free = kilobytes("/proc/meminfo", "MemAvailable") * 1024
    needed = TORCH_BYTES + 4 * p * (VECTORS + (t if ROWS[way] else 0))
    if needed > free:
        return f"takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    command = [sys.executable, __file__, "--one", way, str(t), str(p)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        return f"did not end within {MOST_SECONDS:.0f} s"
    if done.returncode < 0:
        return f"was ended by signal {-done.returncode}"
    if done.returncode > 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def kilobytes(file: str, name: str) -> int:
    """A figure of the system's: VmHWM, the most that a process has had, or MemAvailable, what a new one can have."""
    lines = Path(file).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def measure(path: Path) -> None:
    """Writes seconds and peak memory of a step at every size."""
    result: dict[str, Any] = {
        "dtype": "float32",
        "threads": THREADS,
        "with_t": [],
        "with_p": [],
        "gem_fast": gem_fast.build_info(),
    }
    sizes = [("with_t", t, P_WHILE_T_GROWS) for t in TASKS] + [("with_p", T_WHILE_P_GROWS, p) for p in PARAMETERS]
    for panel_name, t, p in sizes:
        point: dict[str, Any] = {"t": t, "p": p, "seconds": {}, "peak_bytes": {}, "left_out": {}}
        result[panel_name].append(point)
        for way in LOOKS:
            measured = measure_in_a_process(way, t, p)
            if isinstance(measured, str):
                point["left_out"][way] = measured
            else:
                for name, value in measured.items():
                    point[name][way] = value
            path.write_text(json.dumps(result, indent=2) + "\n")
        print(point, flush=True)


def draw(result: dict[str, Any]) -> None:
    """Two panels with the same time axis: growth with t, growth with p."""
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panel(left, result["with_t"], "t", f"past tasks t   (p = {P_WHILE_T_GROWS:,} parameters)")
    panel(right, result["with_p"], "p", f"parameters p   (t = {T_WHILE_P_GROWS} past tasks)")
    left.set_ylabel("time of one step")
    reference(left, result["with_t"], "t", "loop", (5, 100), 1, 2.5)
    reference(left, result["with_t"], "t", "gram", (50, 500), 2, 0.4)
    reference(right, result["with_p"], "p", "loop", (1_000_000, 100_000_000), 1, 2.5)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Time of a GEM step, float32, {result['threads']} CPU threads")
    figure.savefig(RESULTS / "growth.png", dpi=150)


def panel(axes: Axes, points: list[dict[str, Any]], size: str, label: str) -> None:
    """One line per way of making a step, and of the parts that grow otherwise."""
    for name, (color, marker, text) in LOOKS.items():
        measured = [(point[size], point["seconds"][name]) for point in points if name in point["seconds"]]
        axes.plot(*zip(*measured, strict=True), color=color, marker=marker, markersize=5, linewidth=1.5, label=text)
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(EngFormatter(unit="s"))
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def reference(
    axes: Axes, points: list[dict[str, Any]], size: str, way: str, ends: tuple[int, int], power: int, times: float
) -> None:
    """A dashed line of a known slope, at so many times what a way takes at the last size within the ends."""
    measured = [(point[size], point["seconds"][way]) for point in points if way in point["seconds"]]
    last, seconds = max((each for each in measured if each[0] <= ends[1]), default=(0, 0.0))
    if last <= ends[0]:
        return
    x = np.array([ends[0], np.sqrt(ends[0] * ends[1]), ends[1]])
    y = times * seconds * (x / last) ** power
    axes.plot(x, y, color="#777777", linestyle="--", linewidth=1)
    label = f"∝ {size}{'²' if power == 2 else ''}"
    place, side = ((-4, 4), "right") if times > 1 else ((6, -10), "left")
    axes.annotate(label, (x[1], y[1]), xytext=place, textcoords="offset points", ha=side, color="#555555")


def main() -> None:
    """Measures unless told only to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw what results/growth.json has")
    parser.add_argument(
        "--one", nargs=3, metavar=("WAY", "T", "P"), help="measure one way at one size, in this process"
    )
    arguments = parser.parse_args()
    if arguments.one:
        way, t, p = arguments.one
        print(json.dumps(measure_here(way, int(t), int(p))))
        return
    path = RESULTS / "growth.json"
    if not arguments.draw:
        RESULTS.mkdir(exist_ok=True)
        measure(path)
    draw(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
