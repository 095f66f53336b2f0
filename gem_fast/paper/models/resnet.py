"""The network of the CIFAR-100 experiments: ResNet18 with fewer feature maps (section 5.1 of the paper)."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn


def resnet18(n_outputs: int, maps: int = 20) -> ResNet:
    """ResNet18 for images of 32 x 32 pixels, from (batch, 3, 32, 32) to logits (batch, n_outputs).

    The first stage has `maps` feature maps, the others 2, 4 and 8 times as many. 20 gives 1,109,240 parameters for 100
    classes; 64 is the width of He et al. (2016). The weights come from torch's global generator, by torch's default.
    """
    return ResNet(n_outputs, (maps, 2 * maps, 4 * maps, 8 * maps), blocks_per_stage=2)


class ResNet(nn.Module):
    """A residual network with a stem for small images: one 3 x 3 convolution and no pooling."""

    def __init__(self, n_outputs: int, widths: tuple[int, ...], blocks_per_stage: int) -> None:
        """Makes the layers; `widths`: feature maps of each stage, of which all but the first halve height and width."""
        super().__init__()
        self.stem = nn.Sequential(_convolution(3, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU())
        stages: list[nn.Module] = [_stage(widths[0], widths[0], blocks_per_stage, stride=1)]
        stages += [_stage(before, width, blocks_per_stage, stride=2) for before, width in itertools.pairwise(widths)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, n_outputs) of images (batch, 3, 32, 32)."""
        features = F.avg_pool2d(self.stages(self.stem(x)), 4)
        logits: Tensor = self.head(features.flatten(1))
        return logits


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, maps_in: int, maps_out: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _convolution(maps_in, maps_out, stride),
            nn.BatchNorm2d(maps_out),
            nn.ReLU(),
            _convolution(maps_out, maps_out),
            nn.BatchNorm2d(maps_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or maps_in != maps_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(maps_in, maps_out, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(maps_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


def _stage(maps_in: int, maps_out: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _Block(maps_in, maps_out, stride), *(_Block(maps_out, maps_out, stride=1) for _ in range(blocks - 1))
    )


def _convolution(maps_in: int, maps_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(maps_in, maps_out, kernel_size=3, stride=stride, padding=1, bias=False)
