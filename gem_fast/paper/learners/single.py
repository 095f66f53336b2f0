"""The baseline `single`: one network trained on the stream as if it were one task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gem_fast.paper.config import Rate, by_stream
from gem_fast.paper.learners.base import SgdConfig, SgdLearner

__all__ = ["Single"]


@dataclass(frozen=True, kw_only=True)
class SingleConfig(SgdConfig):
    """The options of single."""

    lr: Rate = by_stream(rotations=0.003, permutations=0.03, cifar100=1.0, split=0.1)


class Single(SgdLearner):
    """Plain SGD on the current mini-batch."""

    Config: ClassVar[type[SgdConfig]] = SingleConfig

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one step on the mini-batch (x, y)."""
        self.optimizer.zero_grad()
        self.loss(x, y, task).backward()
        self.optimizer.step()
