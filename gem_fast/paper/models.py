"""The networks of the paper's experiments, and those that are told what a task is about."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = (100, 100)  # units of the paper's layers


def mlp(n_inputs: int, n_outputs: int, hidden: tuple[int, ...] = HIDDEN) -> nn.Sequential:
    """The paper's network for MNIST: fully connected, ReLU, Glorot uniform weights, zero biases.

    From (batch, n_inputs) to logits (batch, n_outputs); its weights come from torch's global generator.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise((n_inputs, *hidden, n_outputs)):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class MultiHeadModel(nn.Module):
    """A network in which each task has a head of its own: a slice of the outputs."""

    def __init__(self, network: nn.Module, outputs: tuple[range, ...]) -> None:
        """Wraps a network, from inputs to the outputs of all tasks; `outputs` are those of each task."""
        super().__init__()
        self.network = network
        self.outputs = outputs

    def forward(self, x: Tensor, task: int) -> Tensor:
        """Logits (batch, classes of the task) for inputs x of task number `task`."""
        outputs = self.outputs[task]
        logits: Tensor = self.network(x)
        return logits[:, outputs.start : outputs.stop]


class ModulatedMlp(nn.Module):
    """The network `mlp`, each hidden unit scaled and shifted by a linear map of the task's descriptor.

    The maps start from zero, so that it is the plain network at first, with the same weights for the same seed. A
    descriptor has `descriptor_size` numbers.
    """

    def __init__(self, n_inputs: int, n_outputs: int, descriptor_size: int, hidden: tuple[int, ...] = HIDDEN) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer for layer in mlp(n_inputs, n_outputs, hidden) if isinstance(layer, nn.Linear))
        self.modulations = nn.ModuleList(nn.Linear(descriptor_size, 2 * units) for units in hidden)
        for parameter in self.modulations.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, descriptor: Tensor) -> Tensor:
        """Logits (batch, n_outputs) for x (batch, n_inputs).

        `descriptor` has shape (descriptor_size,), the same for all examples, or (batch, descriptor_size).
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
    """

    def __init__(self, network: nn.Module) -> None:
        """Wraps a network, from a batch to (batch, descriptor_size)."""
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, descriptor: Tensor) -> Tensor:
        """Logits (batch, classes); `descriptor` has shape ([batch,] classes, descriptor_size)."""
        logits: Tensor = (descriptor @ self.network(x).unsqueeze(2)).squeeze(2)
        return logits


class ResNet18(nn.Module):
    """The paper's network for CIFAR-100: ResNet18 with fewer feature maps, and one 3 x 3 convolution as its stem.

    The first stage has `maps` feature maps; the others have 2, 4 and 8 times as many, and halve height and width. 20
    gives 1,109,240 parameters for 100 classes; 64 is the width of He et al. (2016). The weights come from torch's
    global generator, by torch's default.
    """

    def __init__(self, n_outputs: int, maps: int = 20) -> None:
        super().__init__()
        self.stem = nn.Sequential(_convolution(3, maps), nn.BatchNorm2d(maps), nn.ReLU())
        sizes = [(maps, maps, 1), (maps, 2 * maps, 2), (2 * maps, 4 * maps, 2), (4 * maps, 8 * maps, 2)]
        self.stages = nn.Sequential(
            *(nn.Sequential(_Block(before, after, stride), _Block(after, after)) for before, after, stride in sizes)
        )
        self.head = nn.Linear(8 * maps, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, n_outputs) of images (batch, 3, 32, 32)."""
        features = F.avg_pool2d(self.stages(self.stem(x)), 4)
        logits: Tensor = self.head(features.flatten(1))
        return logits


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, maps_in: int, maps_out: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _convolution(maps_in, maps_out, stride=stride),
            nn.BatchNorm2d(maps_out),
            nn.ReLU(),
            _convolution(maps_out, maps_out),
            nn.BatchNorm2d(maps_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or maps_in != maps_out:
            shortcut = nn.Conv2d(maps_in, maps_out, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(maps_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


def _convolution(maps_in: int, maps_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(maps_in, maps_out, kernel_size=3, stride=stride, padding=1, bias=False)
