"""Training by hand, shared by the tests of the hook."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gem_fast import GEM, EpisodicMemory
from utils.models import mlp

Batches = Iterable[tuple[Any, ...]]  # (x, y, task), or (x, y, task, descriptor)


def sgd(model: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gem: GEM,
    batches: Batches,
    *,
    by_step: bool = False,
    loss_of: Callable[[Any, Any, Any], Tensor] | None = None,
    update_every: int = 1,
) -> list[Tensor]:
    """The losses of the training loop of the README, or of `gem.step`.

    loss_of(x, y, task): what the loop calls backward on; the cross entropy of the model's output where it is None.
    update_every: the optimizer steps once in so many batches.
    """
    losses = []
    for i, (x, y, task, *descriptor) in enumerate(batches):
        update = (i + 1) % update_every == 0
        if by_step:
            losses.append(gem.step(x, y, task, *descriptor, update=update))
            continue
        if i % update_every == 0:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) if loss_of is None else loss_of(x, y, task)
        loss.backward()
        gem.observe(x, y, task, *descriptor)
        if update:
            optimizer.step()
        losses.append(loss.detach())
    return losses


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
