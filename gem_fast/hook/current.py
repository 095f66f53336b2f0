"""The current mini-batch's own forward and backward, for `GEM.step`."""

import torch
from torch import Tensor

from gem_fast.gradients import Batch, Objective


def scales(scaler: torch.amp.GradScaler | None) -> bool:
    """Whether a scaler changes the loss."""
    return scaler is not None and scaler.is_enabled()


def backward(objective: Objective, current: Batch, scaler: torch.amp.GradScaler | None) -> Tensor:
    """A forward under the caller's autocast and a backward, as a training loop has them; the loss, without a history.

    Args:
        objective: the model as the user has it, and its loss.
        current: the mini-batch.
        scaler: what scales the loss before the backward.
    """
    with torch.enable_grad():
        loss = objective.loss(current)
        (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.detach()
