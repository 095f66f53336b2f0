"""Gradient Episodic Memory, Algorithm 1 of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

import gem_fast
from gem_fast.paper.config import Rate, Real, Whole, by_stream
from gem_fast.paper.learners.base import SgdConfig, SgdLearner
from gem_fast.paper.learners.stream_info import StreamInfo

__all__ = ["Gem", "GemConfig", "PublishedGemConfig"]


@dataclass(frozen=True, kw_only=True)
class PublishedGemConfig(SgdConfig):
    """The options of gem_pure_python."""

    lr: Rate = by_stream(rotations=0.1, permutations=0.1, cifar100=0.1, split=0.1)
    memory_per_task: Whole = 256
    """examples of each task kept in the episodic memory"""
    margin: Real = 0.5
    """lower bound of the dual variables v (Eq. 11); larger favours backward transfer"""
    ridge: Real = 1e-3
    """added to the diagonal of the Gramian; 0 is exact"""


@dataclass(frozen=True, kw_only=True)
class GemConfig(PublishedGemConfig):
    """The options of gem."""

    memory_policy: Literal["last", "reservoir", "class-balanced", "herding"] = "last"
    """which examples of each task are kept"""
    memory_batch: Whole | None = None
    """examples of each past task drawn anew for each step; None: all that are kept"""
    refresh_every: Whole = 1
    """steps in which each past task's gradient is computed once, in turns"""


class Gem(SgdLearner):
    """SGD whose steps may not raise the loss on the memory of any past task (Eq. 7 and 8)."""

    Config: ClassVar[type[SgdConfig]] = GemConfig

    def __init__(self, stream_info: StreamInfo, device: torch.device, config: GemConfig) -> None:
        """Makes a new model and hooks its optimizer; arguments as for SgdLearner."""
        super().__init__(stream_info, device, config)
        self.gem = gem_fast.GEM(
            self.model,
            self.optimizer,
            memory=gem_fast.MEMORY_POLICIES[config.memory_policy](per_task=config.memory_per_task),
            margin=config.margin,
            ridge=config.ridge,
            memory_batch=config.memory_batch,
            engine=gem_fast.Fused(refresh_every=config.refresh_every),
            descriptors=dict(enumerate(self.descriptors)),
            seed=0 if config.memory_batch is None else int(torch.randint(2**62, ())),
        )

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one projected step on the mini-batch (x, y), and remembers the mini-batch."""
        self.gem.step(x, y, task)

    def parts(self) -> dict[str, Any]:
        """The optimizer, and the hook with its memory."""
        return {**super().parts(), "gem": self.gem}
