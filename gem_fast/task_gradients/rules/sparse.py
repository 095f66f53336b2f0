"""A first linear layer over a memory of mostly zeros: the same products, without those with a zero."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gem_fast.task_gradients.chain import Link
from gem_fast.task_gradients.pieces import Piece, Segments
from gem_fast.task_gradients.recording import Recorder
from gem_fast.task_gradients.rules.sums import write_sum
from gem_fast.task_gradients.sparse import LayerInput, SparseEntries


def is_memory(x: Tensor, piece: Piece) -> bool:
    """Whether a layer's input is the memory's examples as they are, flattened at most."""
    return (
        x.dim() == 2
        and x.data_ptr() == piece.x.data_ptr()
        and x.numel() == piece.x.numel()
        and len(x) == len(piece.x)
        and x.is_contiguous()
        and not x.requires_grad
    )


def sparse_linear(
    recorder: Recorder, module: nn.Linear, input: Tensor, entries: SparseEntries, positions: Tensor | None
) -> Tensor:
    """As `rules.linear.linear`, from the entries that are not zero."""
    output: Tensor = _SparseLinear.apply(module.weight, module.bias, entries, positions)
    recorder.links.append(Link(module.weight, module.bias, input, output, output.grad_fn, entries, positions))
    write = partial(_write_weight, entries, positions)
    recorder.use(module.weight, output, 0, write, module=module, reads=input)
    recorder.use(module.bias, output, 0, write_sum, module=module)
    return output


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, entries: SparseEntries, at: Tensor | None) -> Tensor:
        return entries.linear(at, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise AssertionError("the gradients of a recorded layer come from its uses")


def _write_weight(
    entries: SparseEntries, positions: Tensor | None, grad: Tensor, segments: Segments, out: Tensor
) -> None:
    torch.ops.gem_fast._layer_gradient_(out, grad, *LayerInput.of(None, entries, positions), segments.sizes)
