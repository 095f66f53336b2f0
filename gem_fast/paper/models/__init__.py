"""The networks of the paper's experiments, one file each."""

from gem_fast.paper.models.mlp import mlp
from gem_fast.paper.models.resnet import resnet18

__all__ = ["mlp", "resnet18"]
