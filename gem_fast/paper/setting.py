"""What a learner is told before the first example: the number of tasks, their outputs, and the network to train."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gem_fast.paper.models import mlp, resnet18
from gem_fast.paper.streams import Stream

__all__ = ["ARCHITECTURES", "Setting", "Sliced"]


@dataclass(frozen=True)
class Setting:
    """The frame of a stream of T tasks.

    Attributes:
        n_tasks: T.
        outputs: For each task the network's outputs that are its classes; a task's labels count from 0 within them.
        n_outputs: All outputs of a network for all tasks.
        input_shape: The shape of one example.
        architecture: Which network of ARCHITECTURES is trained.

    Raises:
        ValueError: The outputs do not fit the number of tasks or of outputs, or there is no such architecture.
    """

    n_tasks: int
    outputs: tuple[range, ...]
    n_outputs: int
    input_shape: tuple[int, ...]
    architecture: str

    def __post_init__(self) -> None:
        if len(self.outputs) != self.n_tasks:
            raise ValueError(f"outputs must be one range for each of the {self.n_tasks} tasks, got {len(self.outputs)}")
        for outputs in self.outputs:
            if not (0 <= outputs.start < outputs.stop <= self.n_outputs and outputs.step == 1):
                raise ValueError(f"outputs must be ranges within the {self.n_outputs} outputs, got {outputs}")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")

    @classmethod
    def of(cls, stream: Stream) -> Setting:
        """The frame of a stream."""
        return cls(stream.n_tasks, stream.outputs, stream.n_outputs, stream.input_shape, stream.architecture)

    @property
    def n_inputs(self) -> int:
        """The numbers that one example is made of."""
        return math.prod(self.input_shape)

    @property
    def sliced(self) -> bool:
        """Whether tasks have outputs of their own; where they have not, each has all of them."""
        return any(outputs != range(self.n_outputs) for outputs in self.outputs)

    def foreign_outputs(self) -> Tensor:
        """Shape (T, n_outputs), bool, on the CPU: which outputs are not those of each task."""
        every = torch.arange(self.n_outputs)
        return torch.stack([(every < outputs.start) | (every >= outputs.stop) for outputs in self.outputs])

    def new_network(self, n_outputs: int, thinner: int = 1) -> nn.Module:
        """A network of the setting's architecture.

        Args:
            n_outputs: Its outputs.
            thinner: By how many times fewer its hidden units or feature maps are than in the paper.

        Returns:
            The network on the CPU, from (batch, *input_shape) to (batch, n_outputs); its weights come from torch's
            global generator.
        """
        return ARCHITECTURES[self.architecture](self, n_outputs, thinner)

    def new_model(self, thinner: int = 1) -> nn.Module:
        """One network for all tasks.

        Args:
            thinner: As for `new_network`.

        Returns:
            Where the tasks share all outputs the network itself, model(x); otherwise a `Sliced`, model(x, task).
        """
        network = self.new_network(self.n_outputs, thinner)
        return Sliced(network, self.outputs) if self.sliced else network


class Sliced(nn.Module):
    """A network of which each task sees its own slice of the outputs."""

    def __init__(self, network: nn.Module, outputs: tuple[range, ...]) -> None:
        """Wraps a network.

        Args:
            network: Maps inputs to the outputs of all tasks.
            outputs: The outputs of each task.
        """
        super().__init__()
        self.network = network
        self.outputs = outputs

    def forward(self, x: Tensor, task: int) -> Tensor:
        """Logits (batch, classes of the task) for inputs x of task number `task`."""
        outputs = self.outputs[task]
        logits: Tensor = self.network(x)
        return logits[:, outputs.start : outputs.stop]


def _mlp(setting: Setting, n_outputs: int, thinner: int) -> nn.Module:
    network = mlp(setting.n_inputs, n_outputs, hidden=(max(1, 100 // thinner),) * 2)
    return network if len(setting.input_shape) == 1 else nn.Sequential(nn.Flatten(), network)


def _resnet18(setting: Setting, n_outputs: int, thinner: int) -> nn.Module:
    return resnet18(n_outputs, maps=max(1, 20 // thinner))


# name -> setting, outputs, thinner -> network
ARCHITECTURES: dict[str, Callable[[Setting, int, int], nn.Module]] = {"mlp": _mlp, "resnet18": _resnet18}
