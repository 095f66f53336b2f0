"""Engines that compute G: one gradient row per constraint, all at the model's present parameters (paper, Eq. 5)."""

from gem_fast.task_gradients.fused import FusedTaskGradients
from gem_fast.task_gradients.loop import LoopTaskGradients
from gem_fast.task_gradients.protocol import Batch, Sample, TaskGradients, TaskRows

__all__ = ["Batch", "FusedTaskGradients", "LoopTaskGradients", "Sample", "TaskGradients", "TaskRows"]
