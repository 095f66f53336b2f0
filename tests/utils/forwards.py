"""A net whose forward is given, and forwards for it: some that can be fused, some that are left to the loop."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """A net of two layers whose forward is given; takes rows of 6 numbers."""

    def __init__(self, forward: Callable[["Net", Tensor], Any], *, width: int = 6) -> None:
        super().__init__()
        self.a = nn.Linear(6, width)
        self.b = nn.Linear(width, 3)
        self.norm = nn.LayerNorm(6)
        self.double()
        self._way = forward

    def forward(self, x: Tensor) -> Any:
        return self._way(self, x)


# Among these, the first two tasks to be compared have 4 and 5 examples.
WAYS: dict[str, Callable[[Net, Tensor], Any]] = {
    "called twice": lambda net, x: net.b(net.a(torch.tanh(net.a(x)))),
    "called twice with other shapes": lambda net, x: net.b(net.a(x[:, None]).sum(1) + net.a(x)),
    "called as often as there are positions": lambda net, x: net.b(sum(net.a(x * i) for i in range(5))),
    "output changed in place": lambda net, x: net.b(net.norm(net.a(x).relu_()).mul_(2).tanh_()),
    "output of three dimensions changed in place": lambda net, x: net.b(
        net.a(x[:, None].expand(-1, 4, -1)).relu_()[:, 1]
    ),
    "part of the output changed in place": lambda net, x: net.b(half_doubled(net.a(x))),
    "output not used": lambda net, x: (net.a(x), net.b(x))[1],
    "gradient stopped": lambda net, x: net.b(net.a(x).detach() + x),
    "positions in front": lambda net, x: net.b(net.norm(net.a(x.expand(4, *x.shape))).sum(0)),
    "as many positions as examples": lambda net, x: net.b(net.norm(net.a(x.expand(9, *x.shape))).sum(0)),
    "one layer frozen": lambda net, x: net.b(net.a(x)),
    "checkpointed": lambda net, x: net.b(checkpoint(lambda h: net.a(h).tanh(), x, use_reentrant=False)),
}


def half_doubled(x: Tensor) -> Tensor:
    x[:, :3] *= 2
    return x


LOOPED: dict[str, tuple[str, Callable[[Net, Tensor], Any]]] = {
    "functional": ("outside of its layer", lambda net, x: net.b(F.linear(net.a(x), net.a.weight))),
    "functional, adding nothing yet": ("outside of its layer", lambda net, x: net.b(net.a(x) + 0 * x @ net.a.weight)),
    "mixes examples": ("mixes the examples", lambda net, x: net.b(net.a(x - x.mean(0)))),
    "mixes examples in a normalisation": (
        "mixes the examples",
        lambda net, x: net.b(F.batch_norm(net.a(x), None, None, training=True)),
    ),
    "examples and positions in one": (
        "does not run over the",
        lambda net, x: net.b(net.a(x.repeat(3, 1)).view(3, -1, 6).sum(0)),
    ),
    "depends on the number of examples": ("mixes the examples", lambda net, x: net.b(net.a(x / len(x)))),
    "a sum of its own": ("mixes the examples", lambda net, x: net.b(net.a(x)) * net.a(x).sum()),
}
