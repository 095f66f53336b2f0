"""Multi-head attention, as the linear layers that it is made of."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gem_fast.gradients.fused.recorder import CannotFuse, Recorder, with_own_history
from gem_fast.gradients.fused.rules.linear import use_linear
from gem_fast.gradients.fused.rules.once_per_task import once_per_task


def attention(
    recorder: Recorder,
    module: nn.MultiheadAttention,
    forward: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The projections of queries, keys and values and the one of the output are uses of linear layers.

    Less common forms, and calls that want the attention weights, take one call per task.
    """
    plain = (
        not need_weights
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
        and type(module.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
        and query.dim() == 3
    )
    if not plain:
        if attn_mask is not None and attn_mask.dim() == 3:
            raise CannotFuse("MultiheadAttention gets a mask per example and head")
        # What is the same for all examples is bound, so that it is not split.
        call = partial(
            forward,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        outputs: tuple[Tensor, Tensor | None] = once_per_task(
            recorder, module, call, query, key, value, key_padding_mask
        )
        return outputs
    dim = recorder.examples_dim(module, query)
    q, k, v = _projected(recorder, module, (query, key, value), dim)
    # (examples, heads, positions, features of a head)
    q, k, v = (x.transpose(0, dim).unflatten(2, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = _mask(module, key_padding_mask, attn_mask, recorder.tasks.total, query.dtype)
    mixed = F.scaled_dot_product_attention(q, k, v, mask, module.dropout if module.training else 0.0)
    mixed = mixed.transpose(1, 2).flatten(2).transpose(0, dim)
    output = with_own_history(F.linear(mixed, module.out_proj.weight, module.out_proj.bias))
    use_linear(recorder, module, module.out_proj.weight, module.out_proj.bias, mixed, output, dim)
    return output, None


def _projected(
    recorder: Recorder, module: nn.MultiheadAttention, inputs: tuple[Tensor, Tensor, Tensor], dim: int
) -> tuple[Tensor, ...]:
    weight, bias, size = module.in_proj_weight, module.in_proj_bias, module.embed_dim
    if inputs[0] is inputs[1] and inputs[1] is inputs[2]:
        packed = F.linear(inputs[0], weight, bias)
        use_linear(recorder, module, weight, bias, inputs[0], packed, dim)
        return packed.chunk(3, -1)
    projected = []
    for i, x in enumerate(inputs):
        part = slice(i * size, (i + 1) * size)
        y = F.linear(x, weight[part], None if bias is None else bias[part])
        use_linear(recorder, module, weight, bias, x, y, dim, part)
        projected.append(y)
    return tuple(projected)


def _mask(
    module: nn.MultiheadAttention, padding: Tensor | None, mask: Tensor | None, examples: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one that is added to the scores, where True or -inf means: does not take part."""
    added = [_added(m, dtype) for m in (padding, mask) if m is not None]
    if padding is not None:
        added[0] = added[0].view(examples, 1, 1, -1)
    if mask is not None and mask.dim() == 3:
        added[-1] = added[-1].view(examples, module.num_heads, *mask.shape[1:])
    return sum(added[1:], added[0]) if added else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
