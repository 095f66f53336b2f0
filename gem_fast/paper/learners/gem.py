"""Gradient Episodic Memory, Algorithm 1 of the paper."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import gem_fast
from gem_fast.paper.learners.base import SgdLearner

__all__ = ["Gem"]


class Gem(SgdLearner):
    """SGD whose steps may not raise the loss on the memory of any past task (Eq. 7 and 8)."""

    def __init__(self, model: nn.Module, lr: float, memory_per_task: int, margin: float, ridge: float) -> None:
        """Takes over the training of a model.

        Args:
            model: Maps inputs to logits.
            lr: Learning rate of SGD.
            memory_per_task: Examples of each task that the episodic memory keeps.
            margin: Lower bound of the dual variables v (Eq. 11); 0 is the plain projection.
            ridge: Added to the diagonal of the Gramian G G^T; 0 is the exact projection.
        """
        super().__init__(model, lr)
        memory = gem_fast.EpisodicMemory(per_task=memory_per_task)
        self.gem = gem_fast.GEM(
            model, self.optimizer, loss_fn=F.cross_entropy, memory=memory, margin=margin, ridge=ridge
        )

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one projected step on the mini-batch (x, y), and remembers the mini-batch."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.gem.observe(x, y, task)
        self.optimizer.step()

    def parts(self) -> dict[str, Any]:
        """The optimizer, and the hook with its memory."""
        return {**super().parts(), "gem": self.gem}
