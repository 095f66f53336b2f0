"""The baseline `multimodal`: the network of `single`, with an input layer for each task."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gem_fast.paper.errors import InputError
from gem_fast.paper.learners.single import Single
from gem_fast.paper.models import mlp
from gem_fast.paper.setting import Setting

__all__ = ["Multimodal"]


class Multimodal(Single):
    """Plain SGD on the current mini-batch, through the input layer of its task and the layers that all tasks share.

    The initial weights are Glorot's, as in all other networks here. The published code starts this one network from
    smaller weights, uniform within 1 / sqrt(inputs), which on the 5000 digits, mean of seeds 0-9, takes 3 points of ACC
    on both streams (rotations .748 instead of .779, permutations .755 instead of .786).
    """

    def __init__(self, setting: Setting, device: torch.device, lr: float) -> None:
        """Makes a new model.

        Args:
            setting: The tasks; the architecture is the MLP, as in the paper, which has this learner on MNIST only.
            device: Where to train.
            lr: Learning rate of SGD.

        Raises:
            InputError: The architecture is another one.
        """
        if setting.architecture != "mlp":
            raise InputError(f"--learner multimodal needs the architecture mlp, got {setting.architecture}")
        super().__init__(setting, device, lr, _MultimodalMlp(setting))


class _MultimodalMlp(nn.Module):
    def __init__(self, setting: Setting, hidden: int = 100) -> None:
        super().__init__()
        self.outputs = setting.outputs
        self.inputs = nn.ModuleList(mlp(setting.n_inputs, hidden, hidden=()) for _ in range(setting.n_tasks))
        self.shared = mlp(hidden, setting.n_outputs, hidden=(hidden,))

    def forward(self, x: Tensor, task: int) -> Tensor:
        outputs = self.outputs[task]
        logits: Tensor = self.shared(F.relu(self.inputs[task](x.flatten(1))))
        return logits[:, outputs.start : outputs.stop]
