"""The gradient of what is added to every example and position: a bias."""

from torch import Tensor

from gem_fast.task_gradients.pieces import Segments


def write_sum(grad: Tensor, segments: Segments, out: Tensor) -> None:
    """out[k] (t, features) = the sum over task k's examples and positions of grad (N, ..., features)."""
    if grad.dim() > 2:
        grad = grad.flatten(1, -2).sum(1)
    segments.sum(grad, out)
