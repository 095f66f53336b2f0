"""Training by hand, shared by the tests of the hook."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gem_fast import GEM, EpisodicMemory
from utils.models import mlp

Batches = Iterable[tuple[Tensor, Tensor, object]]


def sgd(model: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, gem: GEM, batches: Batches) -> None:
    for x, y, task in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gem.observe(x, y, task)
        optimizer.step()


def flat_grad(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def at_a_conflict(
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, torch.optim.Optimizer, GEM, Callable[[], Tensor]]:
    """A model, its optimizer and hook, and a loss whose gradient raises the loss of the one past task."""
    model = mlp(dtype)
    optimizer = sgd(model)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=8))
    x, y = torch.randn(8, 6, dtype=dtype), torch.zeros(8, dtype=torch.long)
    gem.observe(x, y, "past")
    gem.observe(x, y + 1, "now")
    return model, optimizer, gem, lambda: F.cross_entropy(model(x), y + 1)
