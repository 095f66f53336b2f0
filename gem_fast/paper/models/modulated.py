"""Networks that are told which task it is: by a modulation of their hidden units, or by their classes' names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gem_fast.paper.models.mlp import mlp

__all__ = ["ModulatedMlp", "NamedClasses", "angle_descriptor"]

# Multiples of an angle that a descriptor tells: enough to tell apart the 20 tasks of a stream, and neighbours close.
HARMONICS = 4


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
    """A network whose output weights are a linear map of the embeddings of the classes' names.

    So it has outputs for classes that it has never seen. The task's descriptor has the embeddings of its classes.

    Args:
        features: From a batch to features (batch, n_features).
        n_features: Features per example.
        descriptor_size: Numbers in an embedding.
    """

    def __init__(self, features: nn.Module, n_features: int, descriptor_size: int) -> None:
        super().__init__()
        self.features = features
        self.names = nn.Linear(descriptor_size, n_features)

    def forward(self, x: Tensor, descriptor: Tensor) -> Tensor:
        """Logits (batch, classes).

        Args:
            x: The batch.
            descriptor: Shape (classes, descriptor_size), or (batch, classes, descriptor_size).
        """
        weights = self.names(descriptor)
        if weights.dim() == 2:
            weights = weights.expand(len(x), -1, -1)
        logits: Tensor = (weights @ self.features(x).unsqueeze(2)).squeeze(2)
        return logits


def angle_descriptor(degrees: float) -> Tensor:
    """(2 HARMONICS,) float32, of length 1: cosines and sines of an angle and of its multiples."""
    multiples = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64)) * torch.arange(1, HARMONICS + 1)
    return torch.cat([multiples.cos(), multiples.sin()]).div(HARMONICS**0.5).float()
