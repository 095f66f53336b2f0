"""Gradient Episodic Memory, Algorithm 1 of the paper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gem_fast
from gem_fast.paper.learners.base import SgdLearner
from gem_fast.paper.learners.stream_info import StreamInfo

__all__ = ["Gem"]


class Gem(SgdLearner):
    """SGD whose steps may not raise the loss on the memory of any past task (Eq. 7 and 8)."""

    def __init__(
        self,
        stream_info: StreamInfo,
        device: torch.device,
        lr: float,
        memory_per_task: int,
        margin: float,
        ridge: float,
        memory_policy: str,
        memory_batch: int | None,
        refresh_every: int,
    ) -> None:
        """Makes a new model and hooks its optimizer.

        Args:
            stream_info: The tasks.
            device: Where to train.
            lr: Learning rate of SGD.
            memory_per_task: Examples of each task that the episodic memory keeps: `n_memories` of the published code.
            margin: Lower bound of the dual variables v (Eq. 11), `memory_strength` of the published code; 0 projects
                without a margin.
            ridge: Added to the diagonal of the Gramian G G^T; 0 is the exact projection.
            memory_policy: Which examples are kept, one of gem_fast.MEMORY_POLICIES.
            memory_batch: Examples of each past task drawn for each step; None is all of them.
            refresh_every: Steps in which each past task's gradient is computed once, in turns.
        """
        super().__init__(stream_info, device, lr)
        self.gem = gem_fast.GEM(
            self.model,
            self.optimizer,
            memory=gem_fast.MEMORY_POLICIES[memory_policy](per_task=memory_per_task),
            margin=margin,
            ridge=ridge,
            memory_batch=memory_batch,
            engine=gem_fast.Fused(refresh_every=refresh_every),
            seed=0 if memory_batch is None else int(torch.randint(2**62, ())),
        )

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one projected step on the mini-batch (x, y), and remembers the mini-batch."""
        self.optimizer.zero_grad()
        self.loss(x, y, task).backward()
        self.gem.observe(x, y, task)
        self.optimizer.step()

    def parts(self) -> dict[str, Any]:
        """The optimizer, and the hook with its memory."""
        return {**super().parts(), "gem": self.gem}
