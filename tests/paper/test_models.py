"""The networks of the paper: their sizes, shapes and initial weights."""

import pytest
import torch
from torch import nn

from gem_fast.paper.models import ResNet18, mlp


def test_the_network_of_the_mnist_experiments():
    model = mlp(784, 10)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(784, 100), (100, 100), (100, 10)]
    for layer in linear:
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


# The paper's network; the width of He et al., whose stem for large images has 7,680 weights more.
@pytest.mark.parametrize(
    ("n_outputs", "maps", "parameters"), [(100, 20, 1_109_240), (5, 20, 1_109_240 - 95 * 161), (1000, 64, 11_681_832)]
)
def test_parameters_of_resnet18(n_outputs: int, maps: int, parameters: int):
    assert sum(p.numel() for p in ResNet18(n_outputs, maps).parameters()) == parameters


def test_resnet18_has_four_stages_of_two_blocks():
    model = ResNet18(7)
    shapes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert shapes == [(20, 32, 32), (40, 16, 16), (80, 8, 8), (160, 4, 4)]
    weights = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len([m for m in weights if getattr(m, "kernel_size", None) != (1, 1)]) == 18  # hence the name
    assert not any(m.bias is not None for m in weights if isinstance(m, nn.Conv2d))


def test_every_parameter_of_resnet18_has_a_gradient():
    model = ResNet18(4, maps=3)
    nn.functional.cross_entropy(model(torch.rand(5, 3, 32, 32)), torch.arange(5) % 4).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
