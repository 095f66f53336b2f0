"""Gradients that did not exist before a projection."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter

from gem_fast.projection import Projection


def keep_created(
    parameters: Sequence[Parameter], grads: Sequence[Tensor], depends: Sequence[bool], projection: Projection
) -> None:
    """Makes gradients that did not exist the parameters' own, where the projection has a part for them.

    Args:
        parameters: those that are trained.
        grads: their projected gradients.
        depends: per parameter, whether any past task's loss depends on it.
        projection: what it did.
    """
    created = [(p, g) for p, g, used in zip(parameters, grads, depends, strict=True) if p.grad is None and used]
    if not created:
        return
    # On a GPU the outcome is not known without waiting for it: the gradient is then created in any case.
    on_cpu = projection.v.device.type == "cpu"
    if on_cpu and not bool(projection.v.any()):
        return
    for parameter, grad in created:
        parameter.grad = grad
