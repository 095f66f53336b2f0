"""What torch.amp.GradScaler leaves to optimizers with fused=True, and so to the hook that runs before their step.

Other optimizers get unscaled gradients from the scaler, and no step at all where one of them is infinite. Fused ones
are called in any case, with the scale and the finding as their attributes `grad_scale` and `found_inf`.
"""

from torch import Tensor
from torch.optim import Optimizer


def is_skipped(optimizer: Optimizer, wait: bool) -> bool:
    """Whether the scaler found an infinite gradient, so that the fused step changes nothing.

    Args:
        optimizer: the optimizer whose step is about to run.
        wait: read the finding from a GPU, too, which waits for it; otherwise the answer is False there.
    """
    found = getattr(optimizer, "found_inf", None)
    if isinstance(found, Tensor) and found.device.type != "cpu" and not wait:
        return False
    return bool(found)


def unscale_(optimizer: Optimizer) -> None:
    """Divides the gradients by the scale in the fused step's place: the margin is in units of the true gradient."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p.grad is not None:
            p.grad.div_(scale)
    optimizer.grad_scale = None  # type: ignore[attr-defined]
