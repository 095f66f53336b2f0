"""Networks that are told what a task is about: by a modulation of their hidden units, or by their classes' names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gem_fast.paper.models.mlp import mlp

__all__ = ["ModulatedMlp", "NamedClasses"]


class ModulatedMlp(nn.Module):
    """The paper's network for MNIST, each hidden unit scaled and shifted by a linear map of the task's descriptor.

    The maps start from zero, so that it is the plain network at first, with the same weights for the same seed.

    Args:
        n_inputs: Inputs per example.
        n_outputs: Classes.
        descriptor_size: Numbers in a descriptor.
        hidden: Units of each hidden layer.
    """

    def __init__(
        self, n_inputs: int, n_outputs: int, descriptor_size: int, hidden: tuple[int, ...] = (100, 100)
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer for layer in mlp(n_inputs, n_outputs, hidden) if isinstance(layer, nn.Linear))
        self.modulations = nn.ModuleList(nn.Linear(descriptor_size, 2 * units) for units in hidden)
        for parameter in self.modulations.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, descriptor: Tensor) -> Tensor:
        """Logits (batch, n_outputs).

        Args:
            x: Shape (batch, n_inputs).
            descriptor: Shape (descriptor_size,), the same for all examples, or (batch, descriptor_size).
        """
        *hidden, last = self.layers
        for layer, modulation in zip(hidden, self.modulations, strict=True):
            scale, shift = modulation(descriptor).chunk(2, -1)
            x = torch.relu(layer(x) * (1 + scale) + shift)
        logits: Tensor = last(x)
        return logits


class NamedClasses(nn.Module):
    """A network whose logits are inner products of its outputs with the embeddings of the classes' names.

    So each class's output weights are a linear map of its name's embedding, also those of a class never seen, and with
    the rows of the identity as embeddings it is the plain network.

    Args:
        network: From a batch to (batch, descriptor_size).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, descriptor: Tensor) -> Tensor:
        """Logits (batch, classes).

        Args:
            x: The batch.
            descriptor: Shape (classes, descriptor_size), or (batch, classes, descriptor_size).
        """
        logits: Tensor = (descriptor @ self.network(x).unsqueeze(2)).squeeze(2)
        return logits
