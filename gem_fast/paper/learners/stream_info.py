"""What a learner knows of a stream before the first example: the tasks, their outputs, the network to train."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gem_fast.paper.models import HIDDEN, ModulatedMlp, MultiHeadModel, NamedClasses, ResNet18, mlp
from gem_fast.paper.streams import Stream


@dataclass(frozen=True)
class StreamInfo:
    """The shapes of a stream of T tasks, and the architecture that is trained on it."""

    n_tasks: int  # T
    outputs: tuple[range, ...]  # for each task those that are its classes; its labels count from 0 within them
    n_outputs: int  # outputs of a network for all tasks
    input_shape: tuple[int, ...]  # of one example; (pixels,) for an mlp
    architecture: str  # mlp or resnet18: the network that is trained
    descriptors: tuple[Tensor, ...] = ()  # what is told about each task, (d,) or (classes of the task, d)

    @classmethod
    def of(cls, stream: Stream) -> StreamInfo:
        """That of a stream."""
        told = tuple(task.descriptor for task in stream.tasks if task.descriptor is not None)
        return cls(stream.n_tasks, stream.outputs, stream.n_outputs, stream.input_shape, stream.architecture, told)

    def other_outputs_mask(self) -> Tensor:
        """Shape (T, n_outputs), bool, on the CPU: for each task, which outputs are not its own."""
        index = torch.arange(self.n_outputs)
        return torch.stack([(index < outputs.start) | (index >= outputs.stop) for outputs in self.outputs])

    def new_network(self, n_outputs: int, width_divisor: int = 1) -> nn.Module:
        """A network of the stream's architecture on the CPU, from (batch, *input_shape) to (batch, n_outputs).

        The paper's numbers of hidden units or feature maps are divided by `width_divisor`; the weights come from
        torch's global generator.
        """
        if self.architecture == "resnet18":
            return ResNet18(n_outputs, maps=max(1, 20 // width_divisor))
        return mlp(self.input_shape[0], n_outputs, hidden=tuple(max(1, units // width_divisor) for units in HIDDEN))

    def new_model(self) -> nn.Module:
        """One network for all tasks.

        Where all tasks share all outputs it is called as model(x), otherwise, a `MultiHeadModel`, as model(x, task).
        With descriptors it is a `ModulatedMlp`, or `NamedClasses` where a task's descriptor has a row for each of its
        classes, called as model(x, descriptor).
        """
        if self.descriptors:
            size = self.descriptors[0].shape[-1]
            if self.descriptors[0].dim() == 2:
                return NamedClasses(self.new_network(size))
            return ModulatedMlp(self.input_shape[0], self.n_outputs, size)
        network = self.new_network(self.n_outputs)
        share_all = all(outputs == range(self.n_outputs) for outputs in self.outputs)
        return network if share_all else MultiHeadModel(network, self.outputs)
