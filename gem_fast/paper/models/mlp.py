"""The network of the MNIST experiments."""

from __future__ import annotations

import itertools

from torch import nn


def mlp(n_inputs: int, n_outputs: int, hidden: tuple[int, ...] = (100, 100)) -> nn.Sequential:
    """The paper's network for MNIST: fully connected, ReLU, Glorot uniform weights, zero biases.

    From (batch, n_inputs) to logits (batch, n_outputs); its weights come from torch's global generator.
    """
    sizes = (n_inputs, *hidden, n_outputs)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
