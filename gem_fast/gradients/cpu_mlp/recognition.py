"""Linear layers with ReLU between them and nothing else, on a CPU: how they are recognised.

By what autograd recorded in this very pass, however the model is written; nothing else than the layers' own parameters
takes part in such an output. Or by the model itself, where it is an nn.Sequential of nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import _has_any_global_hook

import gem_fast._C as _C
from gem_fast.gradients.fused.losses import has_class_targets
from gem_fast.gradients.fused.recorder import LinearCall
from gem_fast.gradients.fused.task_batch import TaskBatch

# Above this number of units, and without wide vectors, a library's matrix products are faster (bench/README.md).
MAX_UNITS = 512 if _C.build_info()["simd_in_use"] != "baseline" else 0


def find_mlp(calls: Sequence[LinearCall], output: Tensor) -> list[LinearCall] | None:
    """The calls that lead to the model's output (N, classes), first layer first; None where there is more to it."""
    by_node = {call.node: call for call in calls}
    found: list[LinearCall] = []
    node = output.grad_fn
    while node is not None:
        call = by_node.get(node)
        if call is None or not _is_fit(call, output):
            return None
        found.append(call)
        before = [after for after, _ in node.next_functions if not _leads_to_parameter(after)]
        if not before:
            return found[::-1] if len(found) > 1 and _own_parameters(found) else None
        relu: Any = before[0]
        if len(before) > 1 or relu.name() != "ReluBackward0":
            return None
        node = relu.next_functions[0][0]
    return None


def mlp_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers of a model that is such an nn.Sequential; empty where it is not, or something looks into it."""
    modules = list(_flat(model))
    if modules and type(modules[0]) is nn.Flatten and (modules[0].start_dim, modules[0].end_dim) == (1, -1):
        modules = modules[1:]
    kinds = [nn.Linear if i % 2 == 0 else nn.ReLU for i in range(len(modules))]
    layers = [module for module in modules if isinstance(module, nn.Linear)]
    is_mlp = (
        len(modules) % 2 == 1
        and len(layers) > 1
        and list(map(type, modules)) == kinds
        and _own_parameters(layers)
        and all(layer.out_features <= MAX_UNITS for layer in layers)
        and not any(map(has_hooks, model.modules()))
    )
    return layers if is_mlp else []


def has_global_hooks() -> bool:
    """Whether something looks into all modules."""
    return bool(_has_any_global_hook())


def has_hooks(module: nn.Module) -> bool:
    """Whether something looks into the module's forward or backward, or has replaced it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_whole(layers: Sequence[nn.Linear], model: nn.Module, batch: TaskBatch) -> bool:
    """Whether a batch goes through such a model as it is, to cross entropy with class targets."""
    if not layers or not has_class_targets(batch):
        return False
    weight, x = layers[0].weight, batch.inputs.parts[0]
    return (
        isinstance(x, Tensor)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and (x.dim() == 2 or (x.dim() > 2 and type(next(_flat(model))) is nn.Flatten))
        and x.shape[1:].numel() == weight.shape[1]
        and not has_global_hooks()
    )


def _is_fit(call: LinearCall, output: Tensor) -> bool:
    return (
        call.x.dim() == 2
        and call.x.stride(1) == 1
        and call.x.device.type == "cpu"
        and call.x.dtype == call.weight.dtype == output.dtype
        and call.x.dtype in (torch.float32, torch.float64)
        and len(call.weight) <= MAX_UNITS
        # Hooks change gradients on their way.
        and call.x._backward_hooks is None
        and call.output._backward_hooks is None
    )


def _own_parameters(layers: Sequence[LinearCall | nn.Linear]) -> bool:
    """Whether weights and biases are parameters, not what a parametrisation made of some, each in one place only."""
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    return all(isinstance(p, Parameter) for p in parameters) and len(set(parameters)) == len(parameters)


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of an nn.Sequential, and of those within it, in the order in which they are called."""
    if type(module) is not nn.Sequential:
        yield module
        return
    for child in module:
        yield from _flat(child)


def _leads_to_parameter(node: Any) -> bool:
    """Whether a node of autograd's graph is a parameter, or one transposed, or nothing."""
    if node is not None and node.name() == "TBackward0":
        node = node.next_functions[0][0]
    return node is None or hasattr(node, "variable")
