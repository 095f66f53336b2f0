"""What torch is told of the operators: shapes, for torch.compile, and what autograd need not record."""

from typing import Any

import torch
from torch import Tensor
from torch.library import get_ctx, register_fake


@register_fake("gem_fast::gram")
def _(G: Tensor, grads: list[Tensor], in_float64: bool = False) -> tuple[Tensor, Tensor]:
    t = G.shape[0]
    return G.new_empty((t, t), dtype=torch.float64), G.new_empty((t,), dtype=torch.float64)


@register_fake("gem_fast::nnqp")
def _(P: Tensor, q: Tensor, lower: float = 0.0, ridge: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    batch = q.shape[:-1]
    return q.new_empty(q.shape), q.new_empty(batch, dtype=torch.int32), q.new_empty(batch)


@register_fake("gem_fast::project_")
def _(grads: list[Tensor], G: Tensor, margin: float = 0.5, ridge: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v, q = (G.new_empty((G.shape[0],), dtype=torch.float64) for _ in range(2))
    return v, q, G.new_empty((), dtype=torch.int32), G.new_empty((), dtype=torch.float64)


@register_fake("gem_fast::_project_dual")
def _(P: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((), dtype=torch.int32), q.new_empty(())


# ---- the private operators of layers ---------------------------------------------------------------------------------


@register_fake("gem_fast::_sparse_rows")
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, d = x.shape
    entries = get_ctx().new_dynamic_size()
    start = x.new_empty((n * _column_blocks(d) + 1,), dtype=torch.int32)
    return start, x.new_empty((entries,), dtype=torch.int32), x.new_empty((entries,))


@register_fake("gem_fast::_sparse_pairs")
def _(
    start: Tensor, columns: Tensor, values: Tensor, d: int, of_columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lines = d if of_columns else (start.shape[0] - 1) // _column_blocks(d)
    pairs = (lines + 1) // 2
    entries = get_ctx().new_dynamic_size()
    shapes = ((2 * pairs,), (pairs + 1,), (entries,))
    of_lines, pair_start, index = (start.new_empty(shape) for shape in shapes)
    return of_lines, pair_start, index, values.new_empty((entries, 2))


@register_fake("gem_fast::_sparse_linear")
def _(
    start: Tensor, columns: Tensor, values: Tensor, positions: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    rows = (start.shape[0] - 1) // _column_blocks(weight.shape[1]) if positions is None else positions.shape[0]
    return values.new_empty((rows, weight.shape[0]))


@register_fake("gem_fast::_cross_entropy_gradient")
def _(logits: Tensor, target: Tensor, sizes: list[int]) -> Tensor:
    return logits.new_empty(logits.shape)


@register_fake("gem_fast::_mlp_backward")
def _(grad: Tensor, inputs: list[Tensor], weights: list[Tensor], *rest: Any) -> Tensor:
    return _delta(weights, rest[-1])


@register_fake("gem_fast::_mlp_pass")
def _(x: Tensor | None, entries: Any, positions: Any, target: Tensor, weights: list[Tensor], *rest: Any) -> Tensor:
    return _delta(weights, rest[-1])


def _delta(weights: list[Tensor], sizes: list[int]) -> Tensor:
    # Rows are padded to whole cache lines of float32, see csrc/cpu/mlp/matrix.h.
    return weights[0].new_empty((sum(sizes), (weights[0].shape[0] + 15) // 16 * 16))


def _column_blocks(d: int) -> int:
    # See csrc/cpu/mlp/sparse.h.
    return (d + 31) // 32 if d > 32 else 1


# What these change is an argument.
for _name in ("combine_", "pack_", "_layer_gradient_", "_mlp_examples_"):
    register_fake(f"gem_fast::{_name}")(lambda *args: None)


@register_fake("gem_fast::_mlp_project_")
def _(
    weight_grads: list[Tensor],
    bias_grads: list[Tensor],
    other_grads: list[Tensor],
    kept: Tensor,
    x: Tensor | None,
    entries: list[Tensor],
    positions: Tensor | None,
    weights: list[Tensor],
    sizes: list[int],
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _answer(kept, len(sizes))


@register_fake("gem_fast::_mlp_step_")
def _(
    kept: Tensor,
    x: Tensor | None,
    entries: list[Tensor],
    positions: Tensor | None,
    target: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    sizes: list[int],
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kept.new_empty(()), *_answer(kept, len(sizes))


def _answer(like: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v, q = (like.new_empty((t,), dtype=torch.float64) for _ in range(2))
    return v, q, like.new_empty((), dtype=torch.int32), like.new_empty((), dtype=torch.float64)


@register_fake("gem_fast::_distinct")
def _(numbers: Tensor, counts: list[int], size: int) -> Tensor:
    return torch.empty_like(numbers)


# ---- autograd --------------------------------------------------------------------------------------------------------

# The private operators are never to be recorded: what calls them in every step needs no torch.no_grad() for that.
_NEVER_RECORDED = torch.library.Library("gem_fast", "IMPL")
for _name in (
    *("_cross_entropy_gradient", "_distinct", "_layer_gradient_", "_mlp_backward", "_mlp_examples_", "_mlp_pass"),
    *("_mlp_project_", "_mlp_step_"),
):
    _NEVER_RECORDED.impl(_name, torch.library.fallthrough_kernel, "Autograd")
