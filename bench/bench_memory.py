"""How much memory the gradients of past tasks take: by tasks per pass, and by the form of G.

cd bench && python bench_memory.py            measures, then draws results/memory.json and results/memory.png
cd bench && python bench_memory.py --draw     draws the picture again
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import gem_fast
from gem_fast import Batch, Fused, Objective

RESULTS = Path(__file__).parent / "results"
THREADS = 2
TASKS_PER_PASS = (1, 5, 20)
TASKS = (5, 10, 20)
MEGABYTE = 10**6

# Okabe and Ito's colours, told apart by readers of every colour vision.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"


class Transformer(nn.Module):
    """An encoder of token sequences with the sizes of a small language model."""

    def __init__(self, vocabulary: int = 8000, width: int = 512, layers: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


def mlp(tasks: int) -> tuple[nn.Module, list[list[Batch]]]:
    """A small network with 256 examples of each task."""
    sizes = (784, 400, 400, 10)
    layers = [nn.Sequential(nn.Linear(*ends), nn.ReLU()) for ends in itertools.pairwise(sizes[:-1])]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:])), memory(tasks, 256, lambda n: torch.randn(n, 784))


def conv(tasks: int) -> tuple[nn.Module, list[list[Batch]]]:
    """A convolutional network with 64 examples of each task."""
    widths = (3, 32, 64, 64)
    layers = [
        nn.Sequential(nn.Conv2d(*ends, 3, padding=1), nn.GroupNorm(8, ends[1]), nn.ReLU())
        for ends in itertools.pairwise(widths)
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return model, memory(tasks, 64, lambda n: torch.randn(n, 3, 32, 32))


def transformer(tasks: int) -> tuple[nn.Module, list[list[Batch]]]:
    """A large network with 4 short sequences of each task."""
    return Transformer(), memory(tasks, 4, lambda n: torch.randint(8000, (n, 16)))


MODELS = {"mlp": mlp, "conv": conv, "transformer": transformer}


def memory(tasks: int, n: int, inputs: object) -> list[list[Batch]]:
    """n examples of every task."""
    return [[Batch(task, inputs(n), torch.randint(10, (n,)))] for task in range(tasks)]


def peak_bytes() -> int:
    """The most memory that the process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_here(name: str, tasks: int, mode: str) -> dict[str, object]:
    """The peak of two projections over what the model, its gradient and the examples take.

    Args:
        name: of the model.
        tasks: the number of past tasks.
        mode: a form of G, "rows" or "layerwise", or a number of tasks per pass, with rows.
    """
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model, batches = MODELS[name](tasks)
    parameters = list(model.parameters())
    # What the libraries load on first use is none of ours.
    F.cross_entropy(model(batches[0][0].x), batches[0][0].y).backward()
    grads = [p.grad.neg_() for p in parameters]  # violates the first task's constraint
    before = peak_bytes()
    engine = Fused(form="rows", tasks_per_pass=int(mode)) if mode.isdigit() else Fused(form=mode)
    objective = Objective(model, F.cross_entropy)
    for _ in range(2):  # the first pass is verified
        gem_fast.project_(grads, engine(objective, batches, parameters))
    return {
        "model": name,
        "tasks": tasks,
        "mode": mode,
        "parameters": sum(p.numel() for p in parameters),
        "bytes": peak_bytes() - before,
    }


def measure(name: str, tasks: int, mode: str) -> dict[str, object]:
    """The same in a process of its own, whose peak is no other's."""
    command = [sys.executable, __file__, "--one", name, str(tasks), mode]
    point = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(point, flush=True)
    return point


def measure_all() -> dict[str, object]:
    """Every point of the picture."""
    return {
        "dtype": "float32",
        "threads": THREADS,
        "tasks_per_pass": [measure(name, 20, str(limit)) for name in ("mlp", "conv") for limit in TASKS_PER_PASS],
        "modes": [measure("transformer", tasks, mode) for mode in ("rows", "layerwise") for tasks in TASKS],
        "gem_fast": gem_fast.build_info(),
    }


def draw(result: dict[str, object]) -> None:
    """Two panels: the peak by tasks per pass, the peak by tasks for both forms."""
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    points = result["tasks_per_pass"]
    for name, color, marker, label in (
        ("mlp", BLUE, "o", "MLP, 256 examples of each task"),
        ("conv", ORANGE, "s", "convolutional net, 64 of each"),
    ):
        line(left, [p for p in points if p["model"] == name], "mode", label, color, marker)
    left.set(xlabel="tasks per pass, of 20", ylabel="peak memory (MB)", xticks=TASKS_PER_PASS)
    left.set_title("A pass over fewer tasks keeps fewer activations", fontsize=10)
    points = result["modes"]
    millions = points[0]["parameters"] / 1e6
    rows = [p for p in points if p["mode"] == "rows"]
    line(right, rows, "tasks", 'form="rows"', BLUE, "o")
    line(right, [p for p in points if p["mode"] == "layerwise"], "tasks", 'form="layerwise"', GREEN, "^")
    G = [p["tasks"] * p["parameters"] * 4 / MEGABYTE for p in rows]
    right.plot(TASKS, G, color="#777777", linestyle="--", linewidth=1, label="G alone, 4 t p bytes")
    right.set(xlabel=f"past tasks t   (transformer encoder, p = {millions:.1f} million)", xticks=TASKS)
    right.set_title("Without rows of G the peak does not grow with t p", fontsize=10)
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(which="major", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
    figure.suptitle("Peak memory of two projections beyond model, gradient and examples, float32")
    figure.savefig(RESULTS / "memory.png", dpi=150)


def line(axes: Axes, points: list[dict[str, object]], x: str, label: str, color: str, marker: str) -> None:
    """One line with its points."""
    megabytes = [point["bytes"] / MEGABYTE for point in points]
    axes.plot([int(p[x]) for p in points], megabytes, color=color, marker=marker, linewidth=1.5, label=label)


def main() -> None:
    """Measures unless told only to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw results/memory.json again")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "TASKS", "MODE"), help="print one point")
    options = parser.parse_args()
    if options.one:
        name, tasks, mode = options.one
        print(json.dumps(measure_here(name, int(tasks), mode)))
        return
    path = RESULTS / "memory.json"
    if not options.draw:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(measure_all(), indent=2) + "\n")
    draw(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
