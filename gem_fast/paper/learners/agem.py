"""Averaged GEM (Chaudhry et al. 2019): one constraint, on the mean loss over examples drawn from all past tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import gem_fast
from gem_fast.paper.config import Rate, Real, Whole, by_stream
from gem_fast.paper.learners.base import SgdConfig, SgdLearner
from gem_fast.paper.learners.stream_info import StreamInfo

__all__ = ["Agem"]


@dataclass(frozen=True, kw_only=True)
class AgemConfig(SgdConfig):
    """The options of agem."""

    lr: Rate = by_stream(rotations=0.01, permutations=0.03, cifar100=0.1, split=0.1)
    memory_per_task: Whole = 256
    """examples of each task kept in the episodic memory"""
    memory_batch: Whole = 256
    """examples drawn anew from the memory of all past tasks together for each step"""
    margin: Real = 0.0
    """lower bound of the one dual variable where the constraint is violated; 0 is the published method"""


class Agem(SgdLearner):
    """SGD whose steps may not raise the mean loss on a random batch of the memory."""

    Config: ClassVar[type[SgdConfig]] = AgemConfig

    def __init__(self, stream_info: StreamInfo, device: torch.device, config: AgemConfig) -> None:
        """Makes a new model and hooks its optimizer; the hook's seed comes from torch's global generator."""
        super().__init__(stream_info, device, config)
        memory = gem_fast.EpisodicMemory(per_task=config.memory_per_task)
        seed = int(torch.randint(2**62, ()))
        self.agem = gem_fast.AGEM(
            self.model, self.optimizer, memory=memory, memory_batch=config.memory_batch, margin=config.margin, seed=seed
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
