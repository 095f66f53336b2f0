"""What GEM asks of an engine that computes G."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.nn import Parameter


class Batch(NamedTuple):
    """Examples of one task from the memory; `task` is what a multi-head model is called with."""

    task: Hashable
    x: Tensor
    y: Tensor


class TaskRows(NamedTuple):
    """The gradients of the constraints."""

    G: Tensor
    """(t, p): row k is the gradient of constraint k, parameters flattened one after the other. Valid until the engine's
    next call, which may use the same memory."""
    reached: list[bool]
    """Per parameter: whether any constraint depends on it."""


class TaskGradients(Protocol):
    """Computes G, leaving no trace: `.grad` and random number generators are as they were."""

    def __call__(self, constraints: Sequence[Sequence[Batch]], parameters: Sequence[Parameter]) -> TaskRows:
        """Row k is the gradient of the mean loss over all examples of constraint k's batches (Eq. 5)."""
