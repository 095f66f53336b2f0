"""The oracle `joint` (Table 3 of the paper): one network trained on the examples of all tasks, shuffled together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gem_fast.paper.config import Rate, by_stream
from gem_fast.paper.learners.base import SgdConfig, SgdLearner
from gem_fast.paper.learners.stream_info import StreamInfo


@dataclass(frozen=True, kw_only=True)
class JointConfig(SgdConfig):
    """The options of joint."""

    lr: Rate = by_stream(rotations=0.1, permutations=0.1, cifar100=0.1, split=0.1)


class Joint(SgdLearner):
    """Plain SGD on mini-batches of all tasks.

    Tasks do not come one after another here, so only the last row of R counts, and with it ACC. BWT and FWT, which
    compare rows, only show how learning went on.
    """

    Config: ClassVar[type[SgdConfig]] = JointConfig
    trains_jointly: ClassVar[bool] = True

    def __init__(self, stream_info: StreamInfo, device: torch.device, config: JointConfig) -> None:
        super().__init__(stream_info, device, config)
        if self.descriptors:
            # The network answers with the outputs of the task alone; where others have more, some rows are padding.
            self._descriptors = pad_sequence(list(self.descriptors), batch_first=True)
            own = tuple(range(len(outputs)) for outputs in stream_info.outputs)
            stream_info = replace(stream_info, outputs=own, n_outputs=max(map(len, own)))
        self._first = torch.tensor([outputs.start for outputs in stream_info.outputs], device=device)
        self._other_outputs = stream_info.other_outputs_mask().to(device)

    def observe(self, x: Tensor, y: Tensor, task: int | Tensor) -> None:
        """Takes one step on the mini-batch (x, y); `task` is one for all, or one for each example, (batch,), int64."""
        self.optimizer.zero_grad()
        if isinstance(task, int):
            loss = self.loss(x, y, task)
        else:
            task = task.to(x.device)
            # One pass for all tasks: the outputs of other tasks get a probability of 0.
            outputs = self.model(x, self._descriptors[task]) if self.descriptors else self.all_outputs(x)
            logits = outputs.masked_fill(self._other_outputs[task], -torch.inf)
            loss = F.cross_entropy(logits, y + self._first[task])
        loss.backward()
        self.optimizer.step()
