"""The baseline `single`: one network trained on the stream as if it were one task."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Single"]


class Single(nn.Module):
    """Plain SGD on the current mini-batch."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        """Takes over the training of a model.

        Args:
            model: Maps inputs to logits.
            lr: Learning rate of SGD.
        """
        super().__init__()
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one step on the mini-batch (x, y)."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()

    def predict(self, x: Tensor, task: int) -> Tensor:
        """Logits of the network, the same for every task."""
        logits: Tensor = self.model(x)
        return logits
