"""Linear layers with ReLU between them, models that are more than that, and losses for both."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gem_fast.gradients.cpu_mlp.recognition import MAX_UNITS
from utils.models import classes, rows

SIZES = (5, 3, 4)


def images(n: int) -> Tensor:
    return torch.randn(n, 1, 2, 3)


class Net(nn.Module):
    """Three layers, put together by `way`."""

    def __init__(self, way: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.way = way
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def sequential(*front: nn.Module, inplace: bool = False, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        *front,
        nn.Linear(6, 7, bias),
        nn.ReLU(inplace),
        nn.Sequential(nn.Linear(7, 5, bias), nn.ReLU(inplace), nn.Linear(5, 3, bias)),
    ).double()


MLPS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "sequential": (sequential, rows),
    "sequential of images": (lambda: sequential(nn.Flatten()), images),
    "no biases": (lambda: sequential(bias=False), rows),
    "changed in place": (lambda: sequential(inplace=True), rows),
    "two layers": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double(), rows),
    "behind an identity": (lambda: sequential(nn.Identity()), rows),
    "functional": (lambda: Net(lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x)))))), rows),
    "functional, of images": (lambda: Net(lambda net, x: net.c(net.b(net.a(x.flatten(1)).relu()).relu_())), images),
    "with scaled inputs": (lambda: Net(lambda net, x: net.c(torch.relu(net.b(torch.relu(net.a(2 * x)))))), rows),
    "dropping nothing": (lambda: sequential(nn.Dropout(0.0)), rows),
    "only some of the layers": (lambda: Net(lambda net, x: net.c(net.a(x).relu())), rows),
}


def hooked(module: nn.Module, hook: Callable[..., Any]) -> nn.Module:
    next(m for m in module.modules() if isinstance(m, nn.ReLU)).register_forward_hook(hook)
    return module


def watched(net: Net, x: Tensor) -> Tensor:
    h = net.a(x).relu()
    if h.requires_grad:
        h.register_hook(lambda grad: 2 * grad)
    return net.c(net.b(h).relu())


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "another activation": lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double(),
    "no activation": lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double(),
    "an activation at the end": lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU()).double(),
    "one layer": lambda: nn.Sequential(nn.Linear(6, 3)).double(),
    "a way around": lambda: Net(lambda net, x: net.c(net.b(net.a(x).relu()).relu() + net.a(x))),
    "a scaled output": lambda: Net(lambda net, x: 2 * net.c(net.b(net.a(x).relu()).relu())),
    "a layer used twice": lambda: Net(lambda net, x: net.c(net.b(net.b(net.a(x).relu()).relu()).relu())),
    "a hook that changes an output": lambda: hooked(sequential(), lambda m, args, y: 3 * y),
    "a hook that changes a gradient": lambda: Net(watched),
    "wide": lambda: nn.Sequential(nn.Linear(6, MAX_UNITS + 1), nn.ReLU(), nn.Linear(MAX_UNITS + 1, 3)).double(),
}


LOSSES: dict[str, tuple[Any, Callable[[int], Tensor]]] = {
    "label smoothing": (partial(F.cross_entropy, label_smoothing=0.1), classes),
    "soft targets": (F.cross_entropy, lambda n: torch.rand(n, 3).softmax(1)),
    "regression": (F.mse_loss, lambda n: torch.randn(n, 3)),
    "ignored targets": (F.cross_entropy, lambda n: torch.where(torch.arange(n) == 1, -100, classes(n))),
}
