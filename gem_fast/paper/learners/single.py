"""The baseline `single`: one network trained on the stream as if it were one task."""

from __future__ import annotations

from torch import Tensor

from gem_fast.paper.learners.base import SgdLearner

__all__ = ["Single"]


class Single(SgdLearner):
    """Plain SGD on the current mini-batch."""

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one step on the mini-batch (x, y)."""
        self.optimizer.zero_grad()
        self.loss(x, y, task).backward()
        self.optimizer.step()
