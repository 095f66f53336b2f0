"""Chains of linear layers with ReLU between them, on a CPU: how they are recognised.

By what autograd recorded in this very pass, however the model is written; nothing else than the chain's own parameters
takes part in such an output. Or by the model itself, where it is an nn.Sequential of nothing but a chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import _has_any_global_hook

import gem_fast._C as _C
from gem_fast.task_gradients.sparse import SparseEntries

# Above this number of units, and without wide vectors, a library's matrix products are faster (bench/README.md).
MOST_UNITS = 512 if _C.build_info()["simd_in_use"] != "baseline" else 0


class Link(NamedTuple):
    """A linear layer's part in a pass."""

    weight: Tensor
    bias: Tensor | None
    x: Tensor
    """(N, inputs), as the layer got it; in a forward of our own perhaps with zeros up to whole cache lines."""
    output: Tensor | None = None
    node: Any = None
    """The output's place in autograd's graph, before it is changed in place."""
    entries: SparseEntries | None = None
    """The non-zero entries of the memory that x is, or was sampled from, where they are few."""
    positions: Tensor | None = None
    """As for `Piece`."""


def find_chain(links: Sequence[Link], output: Tensor) -> list[Link] | None:
    """The links that lead to the model's output (N, classes), first layer first; None where there is more to it."""
    by_node = {link.node: link for link in links}
    chain: list[Link] = []
    node = output.grad_fn
    while node is not None:
        link = by_node.get(node)
        if link is None or not _is_fit(link, output):
            return None
        chain.append(link)
        before = [after for after, _ in node.next_functions if not _leads_to_parameter(after)]
        if not before:
            return chain[::-1] if len(chain) > 1 and _own_parameters(chain) else None
        relu: Any = before[0]
        if len(before) > 1 or relu.name() != "ReluBackward0":
            return None
        node = relu.next_functions[0][0]
    return None


def layers_of(model: nn.Module) -> list[nn.Linear]:
    """The layers of a model that is a chain and nothing else; empty where it is not, or something watches it."""
    modules = list(_flat(model))
    if modules and type(modules[0]) is nn.Flatten and (modules[0].start_dim, modules[0].end_dim) == (1, -1):
        modules = modules[1:]
    kinds = [nn.Linear if i % 2 == 0 else nn.ReLU for i in range(len(modules))]
    layers = [module for module in modules if isinstance(module, nn.Linear)]
    is_chain = (
        len(modules) % 2 == 1
        and len(layers) > 1
        and list(map(type, modules)) == kinds
        and _own_parameters(layers)
        and all(layer.out_features <= MOST_UNITS for layer in layers)
        and not any(map(is_watched, model.modules()))
    )
    return layers if is_chain else []


def is_watched(module: nn.Module) -> bool:
    """Whether someone else looks into the module's forward or backward, or has replaced it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def goes_through(layers: Sequence[nn.Linear], model: nn.Module, x: Tensor) -> bool:
    """Whether inputs x (N, ...) go through such a model as they are."""
    weight = layers[0].weight if layers else None
    return (
        weight is not None
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and (x.dim() == 2 or (x.dim() > 2 and type(next(_flat(model))) is nn.Flatten))
        and x[0].numel() == weight.shape[1]
        and not _has_any_global_hook()
    )


def _is_fit(link: Link, output: Tensor) -> bool:
    return (
        link.x.dim() == 2
        and link.x.stride(1) == 1
        and link.x.device.type == "cpu"
        and link.x.dtype == link.weight.dtype == output.dtype
        and link.x.dtype in (torch.float32, torch.float64)
        and len(link.weight) <= MOST_UNITS
        # Hooks change gradients on their way.
        and link.x._backward_hooks is None
        and (link.output is None or link.output._backward_hooks is None)
    )


def _own_parameters(layers: Sequence[Link | nn.Linear]) -> bool:
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
