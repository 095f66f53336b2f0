"""Two tasks on the same digits with few shared features: the mean of the losses against UPGrad, and a picture.

Task one is to tell the digit, task two to draw it again from the same sixteen features. The second loss has the longer
gradient, and the mean of both follows it against the first. The picture shows both losses while training, and how often
a step along the update raises one of them, to first order. The projection is exact: reg_eps is 0.

    pip install 'gem_fast[torchjd]' mlxtend matplotlib
    python examples/torchjd_multitask.py --out out/torchjd_multitask.png
"""

import argparse

import matplotlib as mpl
import torch
import torch.nn.functional as F
from digits import digits
from torch import Tensor, nn
from torchjd.aggregation import Mean
from torchjd.autojac import jac_to_grad, mtl_backward

from gem_fast.integrations.torchjd import NnqpProjector, UPGrad

mpl.use("agg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", default="torchjd_multitask.png")
    args = parser.parse_args()

    x, digit = digits()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for ax, name, aggregator in zip(
        axes, ("mean of the losses", "UPGrad"), (Mean(), UPGrad(projector=NnqpProjector(reg_eps=0))), strict=True
    ):
        losses, conflicts, accuracy, error = train(aggregator, x, digit, args.steps)
        print(f"{name}: accuracy {accuracy:.3f}, error {error:.2f}, {conflicts:.1%} of the steps raise a loss")
        window = max(1, args.steps // 30)
        smooth = torch.tensor(losses).unfold(0, window, window).mean(-1)
        for task, label in enumerate((f"digit: {accuracy:.1%} of new ones", f"drawing: error {error:.1f}")):
            ax.plot(torch.arange(len(smooth)) * window, smooth[:, task], label=label)
        ax.set(title=f"{name}: {conflicts:.0%} of the steps raise a loss", xlabel="step", ylabel="loss", yscale="log")
        ax.legend()
    figure.savefig(args.out, dpi=120)


def train(aggregator: nn.Module, x: Tensor, digit: Tensor, steps: int) -> tuple[list, float, float, float]:
    """The losses of each step, the share of steps that raise one of them to first order, and what new digits get."""
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(784, 16), nn.ReLU())
    heads = [nn.Linear(16, 10), nn.Linear(16, 784)]
    optimizer = torch.optim.SGD([*shared.parameters(), *heads[0].parameters(), *heads[1].parameters()], lr=0.05)
    losses, conflicts = [], 0
    for _ in range(steps):
        rows = torch.randint(500, len(x), (32,))
        features = shared(x[rows])
        both = [
            F.cross_entropy(heads[0](features), digit[rows]),
            F.mse_loss(heads[1](features), x[rows], reduction="sum") / (10 * len(rows)),
        ]
        optimizer.zero_grad()
        mtl_backward(both, features=features)
        J = torch.cat([p.jac.flatten(1) for p in shared.parameters()], dim=1)
        jac_to_grad(shared.parameters(), aggregator)
        g = torch.cat([p.grad.flatten() for p in shared.parameters()])
        conflicts += bool((J @ g < -1e-6 * J.norm() * g.norm()).any())
        optimizer.step()
        losses.append([float(loss.detach()) for loss in both])
    with torch.no_grad():
        features = shared(x[:500])
        accuracy = (heads[0](features).argmax(1) == digit[:500]).float().mean()
        error = F.mse_loss(heads[1](features), x[:500], reduction="sum") / 500
    return losses, conflicts / steps, float(accuracy), float(error)


if __name__ == "__main__":
    main()
