"""Any module: called once per task, each time with aliases of the parameters whose gradients are that task's own.

So work modules that look at the whole mini-batch (batch normalisation: its statistics and their running means are then
those of one pass per task, in order), and those whose parameters take part in ways that no other rule knows.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gem_fast.gradients.fused.recorder import CannotFuse, Recorder
from gem_fast.gradients.restore import parameters_replaced


def once_per_task(recorder: Recorder, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The outputs of one call per task, one after the other; each alias's gradient is a task's."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if first is None:
        raise CannotFuse(f"{type(module).__name__} gets no tensor")
    dim = recorder.examples_dim(module, first)
    dims_in, dims_out = _dims(module, dim)
    total, sizes = recorder.tasks.total, recorder.tasks.sizes
    is_split = [
        isinstance(leaf, Tensor) and leaf.dim() > at and leaf.shape[at] == total
        for leaf, at in zip(leaves, _extended(dims_in, len(leaves)), strict=True)
    ]
    wanted = recorder.wanted(module)
    outputs: list[Any] = [None] * len(sizes)
    starts = [0, *accumulate(sizes)]
    for task in recorder.tasks.order:
        mine = [
            leaf.narrow(at, starts[task], sizes[task]) if split else leaf
            for leaf, at, split in zip(leaves, _extended(dims_in, len(leaves)), is_split, strict=True)
        ]
        args_k, kwargs_k = pytree.tree_unflatten(mine, tree)
        aliases = {parameter: parameter.detach().requires_grad_() for _, _, parameter in wanted}
        with parameters_replaced([(owner, name, aliases[parameter]) for owner, name, parameter in wanted]):
            outputs[task] = forward(*args_k, **kwargs_k)
        for parameter, alias in aliases.items():
            recorder.use_alias(parameter, alias, task)
    return _joined(module, outputs, dims_out)


def _dims(module: nn.Module, dim: int) -> tuple[Sequence[int], Sequence[int]]:
    """The examples' dimension of each input and each output; the last entry stands for all that follow."""
    if isinstance(module, nn.RNNBase):
        return (dim, 1), (dim, 1)  # the states are (layers, examples, units) in any case
    if isinstance(module, nn.MultiheadAttention):
        return (dim, dim, dim, 0), (dim, 0)
    return (dim,), (dim,)


def _extended(dims: Sequence[int], n: int) -> list[int]:
    return [dims[min(i, len(dims) - 1)] for i in range(n)]


def _joined(module: nn.Module, outputs: list[Any], dims: Sequence[int]) -> Any:
    if len(outputs) == 1:
        return outputs[0]
    flat = [pytree.tree_flatten(output) for output in outputs]
    tree = flat[0][1]
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    joined = []
    for parts, dim in zip(columns, _extended(dims, len(columns)), strict=True):
        if isinstance(parts[0], Tensor):
            joined.append(torch.cat(parts, dim))
        elif all(part == parts[0] for part in parts):
            joined.append(parts[0])
        else:
            raise CannotFuse(f"{type(module).__name__} returns {type(parts[0]).__name__} that differs between tasks")
    return pytree.tree_unflatten(joined, tree)
