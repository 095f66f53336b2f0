"""Mixed precision: what torch.amp.GradScaler leaves to the hook, and autocast in the pass over the memory.

Optimizers get unscaled gradients from the scaler, and no step at all where one of them is infinite. But those with
fused=True are called in any case, with the scale and the finding as their attributes `grad_scale` and `found_inf`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from gem_fast.containers import tensors
from gem_fast.gradients import Constraint, Objective, Sample, TaskGradients
from gem_fast.gradients.restore import buffers_restored
from gem_fast.wrappers import uncompiled


def is_skipped(optimizer: Optimizer, wait: bool) -> bool:
    """Whether the scaler found an infinite gradient, so that the fused step changes nothing.

    Args:
        optimizer: the optimizer whose step is about to run.
        wait: read the finding from a GPU, too, which waits for it; otherwise the answer is False there.
    """
    found = found_inf(optimizer)
    if found is None or (found.device.type != "cpu" and not wait):
        return False
    return bool(found)


def found_inf(optimizer: Optimizer) -> Tensor | None:
    """What the scaler tells an optimizer with fused=True, not zero where a gradient is infinite; else None."""
    found = getattr(optimizer, "found_inf", None)
    return found if isinstance(found, Tensor) else None


def unscale_(optimizer: Optimizer) -> None:
    """Divides the gradients by the scale in the fused step's place: the margin is in units of the true gradient."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p.grad is not None:
            p.grad.div_(scale)
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def disabled(model: nn.Module, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A block outside of autocast: in float16 without a loss scale small gradients, and their constraints, are lost.

    Accelerate enters autocast in the forward of the model that it prepares: the model's own forward takes its place.
    """
    return _disabled(model, device) if is_on(model, device) else contextlib.nullcontext()


@contextlib.contextmanager
def _disabled(model: nn.Module, device: torch.device) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if _is_enabled(device):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        prepared = _prepared(model)
        if prepared is not None:
            stack.callback(vars(prepared).__setitem__, "forward", prepared.forward)
            vars(prepared)["forward"] = prepared._original_forward
        yield


def is_on(model: nn.Module, device: torch.device) -> bool:
    """Whether the model's forward runs under autocast: the caller's, or one that it enters itself."""
    return _is_enabled(device) or _prepared(model) is not None


def _is_enabled(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _prepared(model: nn.Module) -> nn.Module | None:
    """The model, or the one inside of a compiled one, where Accelerate has replaced its forward."""
    model = uncompiled(model)
    return model if {"_original_forward", "forward"} <= vars(model).keys() else None


class PassAutocast:
    """Has passes over the memory run outside of autocast, but under it where the model cannot do without.

    Parameters in half precision take inputs of another floating-point type only under autocast of their own type,
    unless the model converts its inputs itself. So where they meet, and a pass outside of autocast fails, it is run
    under it; and so are all later ones.
    """

    def __init__(self) -> None:
        self._is_needed = False

    def context(
        self, constraints: Sequence[Constraint], parameter: Parameter
    ) -> contextlib.AbstractContextManager[None]:
        """The block that a pass runs in, which is outside of autocast so far; parameter: any of them."""
        if self._is_needed and _half_meets_another(constraints, parameter):
            return torch.autocast(parameter.device.type, dtype=parameter.dtype)
        return contextlib.nullcontext()

    def run(
        self,
        engine: Callable[..., TaskGradients],
        objective: Objective,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        sample: Sample | None,
    ) -> TaskGradients:
        """What the engine makes of these arguments."""
        if not _half_meets_another(constraints, parameters[0]):
            return engine(objective, constraints, parameters, sample)
        if self._is_needed:
            with self.context(constraints, parameters[0]):
                return engine(objective, constraints, parameters, sample)
        modules = objective.model.modules()
        with contextlib.suppress(RuntimeError), buffers_restored(modules, only_on_failure=True):
            return engine(objective, constraints, parameters, sample)
        with torch.autocast(parameters[0].device.type, dtype=parameters[0].dtype):
            G = engine(objective, constraints, parameters, sample)
        self._is_needed = True
        return G


def _half_meets_another(constraints: Sequence[Constraint], parameter: Parameter) -> bool:
    if parameter.dtype not in (torch.bfloat16, torch.float16):
        return False
    inputs = (x for batches in constraints for batch in batches for x in tensors(batch.x))
    return any(isinstance(x, Tensor) and x.is_floating_point() and x.dtype != parameter.dtype for x in inputs)
