"""What stands inside the wrappers that other libraries put around an optimizer or a model."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

# Where wrappers keep the optimizer that they call: Accelerate, Lightning, Lookahead, SWA, SAM.
_OPTIMIZER_NAMES = ("optimizer", "base_optimizer", "_optimizer", "_base_optimizer")

# Where wrappers keep the model that they call: DataParallel and DDP, torch.compile, Fabric, FSDP, PEFT.
_MODEL_NAMES = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "base_model", "model")

# What the task is called in a forward: here and in Avalanche.
_TASK_NAMES = ("task", "task_labels")
_DESCRIPTOR_NAMES = ("descriptor",)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside of one that torch.compile made; any other as it is."""
    if "_orig_mod" not in model._modules:  # asked in each step: getattr would take longer to say so
        return model
    original: nn.Module = model._orig_mod  # type: ignore[assignment]
    return original


def inner_optimizer(optimizer: object) -> Optimizer:
    """The optimizer whose step changes the parameters, where it can be found inside of wrappers.

    A wrapper keeps it as `optimizer` or `base_optimizer` and has the same parameter groups, not copies of them.

    Raises:
        TypeError: what is left has no step that a hook could come before.
    """
    seen = [optimizer]
    while (inner := _wrapped(optimizer)) is not None and not any(inner is other for other in seen):
        optimizer = inner
        seen.append(inner)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; if it is a wrapper, pass the "
            "optimizer inside whose step changes the parameters"
        )
    if "_optimizer_step_pre_hooks" not in vars(optimizer):  # its constructor left out Optimizer's
        raise TypeError(
            f"optimizer must be one that takes step hooks, got the wrapper {type(optimizer).__name__}; pass the "
            "optimizer inside whose step changes the parameters"
        )
    return optimizer


def _wrapped(optimizer: object) -> Optimizer | None:
    groups = getattr(optimizer, "param_groups", None)
    for name in _OPTIMIZER_NAMES:
        inner = getattr(optimizer, name, None)
        if isinstance(inner, Optimizer) and isinstance(groups, list):
            own = inner.param_groups
            if len(own) == len(groups) and all(a is b for a, b in zip(own, groups, strict=True)):
                return inner
    return None


def task_parameter(model: nn.Module) -> str | None:
    """The name under which the model's forward takes the task, `task` or `task_labels`; None where it takes none.

    A forward with **kwargs and without such a parameter passes on what it is given: the model inside counts.
    """
    parameter = _parameter_called(_TASK_NAMES, model)
    return None if parameter is None else parameter.name


def descriptor_parameter(model: nn.Module, forward: Callable[..., Any] | None = None) -> inspect.Parameter | None:
    """The parameter `descriptor` of forward(model, x, ...), else of the model, found as by `task_parameter`; or None.

    Args:
        model: the model.
        forward: what the model is called by; None: as it is.
    """
    if forward is None:
        return _parameter_called(_DESCRIPTOR_NAMES, model)
    return inspect.signature(forward).parameters.get(_DESCRIPTOR_NAMES[0])


def _parameter_called(names: Sequence[str], model: nn.Module) -> inspect.Parameter | None:
    seen: set[nn.Module] = set()
    while model not in seen:
        seen.add(model)
        parameters = list(_parameters(model))
        for name in names:
            for p in parameters:
                if p.name == name and p.kind is not p.VAR_KEYWORD:
                    return p
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return None
        is_wrapper = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
        model = _inner_model(model, is_wrapper)
    return None


def _parameters(model: nn.Module) -> Iterator[inspect.Parameter]:
    schema = getattr(model.forward, "schema", None)
    if isinstance(model, torch.jit.ScriptModule) and schema is not None:
        # A traced forward has no signature in Python. Its first argument is the module.
        for argument in schema.arguments[1:]:
            default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
            yield inspect.Parameter(argument.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
    else:
        with contextlib.suppress(TypeError, ValueError):  # of a callable that Python knows no signature of
            yield from inspect.signature(model.forward).parameters.values()


def _inner_model(model: nn.Module, is_wrapper: bool) -> nn.Module:
    """The model that gets the keyword arguments of `model`, as far as names tell; else `model`."""
    for name in _MODEL_NAMES:
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return inner
    children = list(model.children())
    return children[0] if is_wrapper and len(children) == 1 else model
