"""Averaged GEM (Chaudhry et al. 2019): one constraint, on the mean loss over examples drawn from all past tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gem_fast
from gem_fast.paper.learners.base import SgdLearner
from gem_fast.paper.learners.stream_info import StreamInfo

__all__ = ["Agem"]


class Agem(SgdLearner):
    """SGD whose steps may not raise the mean loss on a random batch of the memory."""

    def __init__(
        self,
        stream_info: StreamInfo,
        device: torch.device,
        lr: float,
        memory_per_task: int,
        memory_batch: int,
        margin: float,
    ) -> None:
        """Makes a new model and hooks its optimizer; the hook's seed comes from torch's global generator.

        Args:
            stream_info: The tasks.
            device: Where to train.
            lr: Learning rate of SGD.
            memory_per_task: Examples of each task that the episodic memory keeps.
            memory_batch: Examples drawn from the past tasks' memories for each step.
            margin: Lower bound of the one dual variable where the constraint is violated; 0 is the published method.
        """
        super().__init__(stream_info, device, lr)
        memory = gem_fast.EpisodicMemory(per_task=memory_per_task)
        seed = int(torch.randint(2**62, ()))
        self.agem = gem_fast.AGEM(
            self.model, self.optimizer, memory=memory, memory_batch=memory_batch, margin=margin, seed=seed
        )

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one projected step on the mini-batch (x, y), and remembers the mini-batch."""
        self.optimizer.zero_grad()
        self.loss(x, y, task).backward()
        self.agem.observe(x, y, task)
        self.optimizer.step()

    def parts(self) -> dict[str, Any]:
        """The optimizer, and the hook with its memory and its generator."""
        return {**super().parts(), "agem": self.agem}
