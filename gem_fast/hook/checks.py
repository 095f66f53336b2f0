"""What the hook asks of the optimizer and of the parameters it trains: each check raises with one sentence."""

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from gem_fast.gradients import Engine
from gem_fast.ops import Status
from gem_fast.projection import Projection


def trained_parameters(optimizer: Optimizer) -> list[Parameter]:
    """The parameters that the next step may change, in the optimizer's order; frozen ones are left out."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def check_options(margin: float, ridge: float, memory_batch: int | None, engine: object) -> None:
    """Raises unless these are what `GEM` takes under these names."""
    for name, value in (("margin", margin), ("ridge", ridge)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if memory_batch is not None and memory_batch < 1:
        raise ValueError(f"memory_batch must be at least 1 example, got {memory_batch}")
    if not isinstance(engine, Engine):
        raise TypeError(
            'engine must be "auto", gem_fast.Fused(...), gem_fast.Loop(...) or another gem_fast.Engine, '
            f"got {engine!r:.50}"
        )


def check_attachable(model: nn.Module, optimizer: Optimizer) -> None:
    """Raises unless a hook on `optimizer` can project the gradients of `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer must be one whose step needs no closure, got {type(optimizer).__name__}: its closure computes "
            "new gradients inside the step, after they could have been projected"
        )
    of_model = {id(p) for p in model.parameters()}
    if not of_model:
        raise ValueError("model must have parameters, got a model without any")
    parameters = trained_parameters(optimizer)
    if not any(id(p) in of_model for p in parameters):
        raise ValueError("optimizer must hold parameters of the model that require gradients, got none of them")
    check_parameters(parameters)


def check_parameters(parameters: Sequence[Parameter]) -> None:
    """Raises unless the parameters are real and share a dtype and device, as G's rows do, with dense gradients."""
    first = parameters[0]
    for p in parameters:
        if p.dtype.is_complex:
            raise ValueError(
                f"the optimizer's parameters must be real numbers, got {p.dtype} for shape {tuple(p.shape)}; keep real "
                "and imaginary parts as two parameters"
            )
        if p.dtype != first.dtype or p.device != first.device:
            raise ValueError(
                f"the optimizer's parameters must all have one dtype and device, got {first.dtype} on {first.device} "
                f"for shape {tuple(first.shape)} and {p.dtype} on {p.device} for shape {tuple(p.shape)}"
            )
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise TypeError(
                f"gradients must be dense, got a sparse one (layout {p.grad.layout}) for a parameter of shape "
                f"{tuple(p.shape)}; build its module with sparse=False"
            )


def check_solved(projection: Projection) -> None:
    """Raises RuntimeError unless the projection's status is `Status.SOLVED`; waits for a GPU."""
    if int(projection.status) != Status.SOLVED:
        raise RuntimeError(
            f"the projection must be solved, got status {Status(int(projection.status)).name} with a residual of "
            f"{float(projection.residual):.1e}"
        )
