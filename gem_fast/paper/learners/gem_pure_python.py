"""GEM as public versions write it, in Python alone: what Table 1 compares the compiled projection with."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from gem_fast.memory import EpisodicMemory
from gem_fast.paper.errors import extra
from gem_fast.paper.learners.base import SgdConfig, SgdLearner
from gem_fast.paper.learners.gem import PublishedGemConfig
from gem_fast.paper.learners.stream_info import StreamInfo
from gem_fast.reference import PurePythonGEM

__all__ = ["GemPurePython"]


class GemPurePython(SgdLearner):
    """The same method as Gem, from gem_fast.reference; needs quadprog."""

    Config: ClassVar[type[SgdConfig]] = PublishedGemConfig

    def __init__(self, stream_info: StreamInfo, device: torch.device, config: PublishedGemConfig) -> None:
        """Makes a new model; arguments as for SgdLearner, but quadprog fails at a ridge of 0."""
        with extra("the learner gem_pure_python"):
            import quadprog  # noqa: F401
        super().__init__(stream_info, device, config)
        self.memory = EpisodicMemory(per_task=config.memory_per_task)
        self.gem = PurePythonGEM(
            self.model, self.optimizer, self.memory, forward=self.logits, margin=config.margin, ridge=config.ridge
        )

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one projected step on the mini-batch (x, y), and remembers the mini-batch."""
        self.gem.observe(x, y, task)

    def parts(self) -> dict[str, Any]:
        """The optimizer and the memory."""
        return {**super().parts(), "memory": self.memory}
