"""The baseline `independent`: a network for each task, with T times fewer hidden units than the one of `single`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gem_fast.paper.config import Rate, by_stream
from gem_fast.paper.learners.base import SgdConfig
from gem_fast.paper.learners.single import Single
from gem_fast.paper.learners.stream_info import StreamInfo
from gem_fast.state import check_count, check_keys

__all__ = ["Independent"]


@dataclass(frozen=True, kw_only=True)
class IndependentConfig(SgdConfig):
    """The options of independent."""

    lr: Rate = by_stream(rotations=0.1, permutations=0.03, cifar100=0.3, split=0.1)
    clone: bool = True
    """whether a new task's network starts as a clone of the last one, if of the same number of outputs, or at random"""


class Independent(Single):
    """Plain SGD on the current mini-batch, with the network of its task alone.

    With 20 tasks a layer has five units, some of which die: on the 5000 digits the standard deviation of ACC over seeds
    is 5 points on rotations and 8 to 10 on permutations, here and in the published code alike.
    """

    Config: ClassVar[type[SgdConfig]] = IndependentConfig

    def __init__(self, stream_info: StreamInfo, device: torch.device, config: IndependentConfig) -> None:
        """Makes T new networks.

        Args:
            stream_info: The T tasks; a network has its task's outputs only.
            device: Where to train.
            config: The hyper-parameters.
        """
        nets = [
            stream_info.new_network(len(outputs), width_divisor=stream_info.n_tasks) for outputs in stream_info.outputs
        ]
        super().__init__(stream_info, device, config, _NetworkPerTask(nets))
        self.nets = nets
        self.clone = config.clone
        self.recent = _TrainedTasks(stream_info.n_tasks)

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one step of the task's network on the mini-batch (x, y)."""
        if self.clone and self.recent.tasks and task not in self.recent.tasks:
            last = self.recent.tasks[-1]
            if len(self.stream_info.outputs[task]) == len(self.stream_info.outputs[last]):
                self.nets[task].load_state_dict(self.nets[last].state_dict())
        self.recent.observe(task)
        super().observe(x, y, task)

    def parts(self) -> dict[str, Any]:
        """The optimizer, and which networks have been trained."""
        return {**super().parts(), "recent": self.recent}


class _NetworkPerTask(nn.ModuleList):
    def forward(self, x: Tensor, task: int) -> Tensor:
        logits: Tensor = self[task](x)
        return logits


class _TrainedTasks:
    """The tasks seen so far, the one trained last at the end."""

    def __init__(self, n_tasks: int) -> None:
        self.tasks: list[int] = []
        self._n_tasks = n_tasks

    def observe(self, task: int) -> None:
        if task in self.tasks:
            self.tasks.remove(task)
        self.tasks.append(task)

    def state_dict(self) -> dict[str, Any]:
        return {"tasks": list(self.tasks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_keys("recent", state, ("tasks",))
        tasks = state["tasks"]
        if not isinstance(tasks, list):
            raise ValueError(f"recent tasks must be a list, got {type(tasks).__name__}")
        for task in tasks:
            check_count("a recent task", task, 0, self._n_tasks - 1)
        if len(set(tasks)) != len(tasks):
            raise ValueError("recent tasks must differ, got one twice")
        self.tasks = list(tasks)
