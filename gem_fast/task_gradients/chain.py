"""Chains of linear layers with ReLU between them, on a CPU: one backward of our own through all of them, task by task.

A chain is recognised by what autograd recorded in this very pass, however the model is written; nothing else than the
chain's own parameters takes part in such an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from gem_fast.task_gradients.sparse import SparseEntries

# Above this number of units a library's matrix products are faster (bench/README.md).
MOST_UNITS = 512


class Link(NamedTuple):
    """A linear layer's part in a pass."""

    weight: Parameter
    bias: Parameter | None
    x: Tensor
    """(N, inputs), as the layer got it."""
    output: Tensor
    node: Any
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
            own = [p for link in chain for p in (link.weight, link.bias) if p is not None]
            shared = len(set(own)) < len(own)
            return None if len(chain) < 2 or shared else chain[::-1]
        if len(before) > 1 or before[0].name() != "ReluBackward0":
            return None
        node = before[0].next_functions[0][0]
    return None


def write_chain(chain: Sequence[Link], grad: Tensor, sizes: list[int], blocks: dict[Parameter, Tensor]) -> Tensor:
    """Writes rows of G, all but those of the first layer's weight.

    Args:
        chain: what `find_chain` found.
        grad: (N, classes): the gradient at the output.
        sizes: the number of examples of each task.
        blocks: for each parameter whose gradient is wanted the (t, ...) part of G's rows that is its own.

    Returns:
        delta (N, units, and zeros up to whole cache lines): the gradient at the output of the first layer.
    """
    nothing = grad.new_empty(0)
    for parameter in blocks.keys() - {parameter for link in chain for parameter in (link.weight, link.bias)}:
        blocks[parameter].zero_()
    delta: Tensor = torch.ops.gem_fast._chain_backward(
        grad,
        [link.x for link in chain[1:]],
        [link.weight for link in chain],
        [blocks.get(link.weight, nothing) for link in chain[1:]],
        [nothing if link.bias is None else blocks.get(link.bias, nothing) for link in chain],
        sizes,
    )
    return delta


def write_first(first: Link, delta: Tensor, sizes: list[int], block: Tensor) -> None:
    """Writes the rows of the first layer's weight, block (t, units, inputs)."""
    if first.entries is not None:
        first.entries.gradient_(block, delta, sizes, first.positions)
    else:
        torch.ops.gem_fast._linear_gradient_(block, delta, first.x, sizes)


def _is_fit(link: Link, output: Tensor) -> bool:
    return (
        all(isinstance(p, Parameter) for p in (link.weight, link.bias) if p is not None)  # no parametrisation's
        and link.x.dim() == 2
        and link.x.stride(1) == 1
        and link.x.device.type == "cpu"
        and link.x.dtype == link.weight.dtype == output.dtype
        and link.x.dtype in (torch.float32, torch.float64)
        and len(link.weight) <= MOST_UNITS
        # Hooks change gradients on their way.
        and link.x._backward_hooks is None
        and link.output._backward_hooks is None
    )


def _leads_to_parameter(node: Any) -> bool:
    """Whether a node of autograd's graph is a parameter, or one transposed, or nothing."""
    if node is not None and node.name() == "TBackward0":
        node = node.next_functions[0][0]
    return node is None or hasattr(node, "variable")
