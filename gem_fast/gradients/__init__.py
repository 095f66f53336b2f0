"""The past tasks' gradients, all at the model's present parameters (paper, Eq. 5): engines, and the forms of G."""

from gem_fast.gradients.fused.engine import Fused
from gem_fast.gradients.fused.rules import register_rule
from gem_fast.gradients.interface import Batch, Constraint, Engine, Objective, Sample, TaskGradients
from gem_fast.gradients.layerwise import LayerwiseGradients
from gem_fast.gradients.loop import Loop
from gem_fast.gradients.rows import RowGradients

__all__ = [
    "Batch",
    "Constraint",
    "Engine",
    "Fused",
    "LayerwiseGradients",
    "Loop",
    "Objective",
    "RowGradients",
    "Sample",
    "TaskGradients",
    "register_rule",
]
