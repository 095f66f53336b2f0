"""The oracle `joint` (Table 3 of the paper): one network trained on the examples of all tasks, shuffled together."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gem_fast.paper.learners.base import SgdLearner
from gem_fast.paper.setting import Setting

__all__ = ["Joint"]


class Joint(SgdLearner):
    """Plain SGD on mini-batches of all tasks.

    Nothing comes one after another here: of the matrix R only the last row counts, and ACC with it. BWT and FWT, which
    compare rows, only show how learning went on.
    """

    mixes_tasks: ClassVar[bool] = True

    def __init__(self, setting: Setting, device: torch.device, lr: float) -> None:
        """Makes a new model; arguments as for SgdLearner."""
        super().__init__(setting, device, lr)
        self._first = torch.tensor([outputs.start for outputs in setting.outputs], device=device)
        self._foreign = setting.foreign_outputs().to(device)

    def observe(self, x: Tensor, y: Tensor, task: int | Tensor) -> None:
        """Takes one step on the mini-batch (x, y); `task` is one for all, or one for each example, (batch,), int64."""
        self.optimizer.zero_grad()
        if isinstance(task, int):
            loss = self.loss(x, y, task)
        else:
            task = task.to(x.device)
            # One pass for all tasks: a class of another task gets no part of the softmax.
            logits = self.all_outputs(x).masked_fill(self._foreign[task], -torch.inf)
            loss = F.cross_entropy(logits, y + self._first[task])
        loss.backward()
        self.optimizer.step()
