"""The networks of the paper's experiments."""

from gem_fast.paper.models.mlp import mlp

__all__ = ["mlp"]
