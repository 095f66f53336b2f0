"""The gradient of what is added to every example and position: a bias."""

from torch import Tensor

from gem_fast.gradients.fused.task_batch import TaskSizes


def write_bias(grad: Tensor, tasks: TaskSizes, out: Tensor) -> None:
    """out[k] (features,) = the sum over task k's examples and positions of grad (N, ..., features)."""
    tasks.sum(grad.flatten(1, -2).sum(1) if grad.dim() > 2 else grad, out)
