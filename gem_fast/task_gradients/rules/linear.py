"""Linear layers: y = x W' + b."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gem_fast.task_gradients.chain import Link
from gem_fast.task_gradients.pieces import Segments
from gem_fast.task_gradients.recording import WHOLE, Recorder, examples_first, of_features, own_history
from gem_fast.task_gradients.rules.sparse import is_memory, sparse_linear
from gem_fast.task_gradients.rules.sums import write_sum

# Elements of a weight that is copied into G: one batched product takes half the time of one product per row of G, which
# is what a result that is not contiguous comes to.
_SMALL = 2**14


def linear(recorder: Recorder, module: nn.Linear, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """dL/dW = sum over the examples (and positions) of dL/dy x', dL/db = that of dL/dy."""
    dim = recorder.examples_dim(module, input)
    piece = recorder.piece
    if piece is not None and piece.entries is not None and is_memory(input, piece):
        return sparse_linear(recorder, module, input, piece.entries, piece.positions)
    output = own_history(forward(input))
    recorder.links.append(Link(module.weight, module.bias, input, output, output.grad_fn))
    use_linear(recorder, module, module.weight, module.bias, input, output, dim)
    return output


def use_linear(
    recorder: Recorder,
    module: nn.Module,
    weight: Tensor | None,
    bias: Tensor | None,
    input: Tensor,
    output: Tensor,
    dim: int,
    part: slice = WHOLE,
) -> None:
    """Notes output = input weight[part]' + bias[part], with the examples along dimension `dim` of both."""
    x = examples_first(input.detach(), dim)
    write = partial(_write_weight, x)
    recorder.use(weight, output, dim, write, module=module, reads=input, part=part, cut=of_features(write, -1))
    recorder.use(bias, output, dim, write_sum, module=module, part=part, cut=of_features(write_sum, -1))


def _write_weight(x: Tensor, grad: Tensor, segments: Segments, out: Tensor) -> None:
    x = x.reshape(segments.total, -1, x.shape[-1])
    grad = grad.reshape(segments.total, -1, grad.shape[-1])
    if segments.equal is not None:
        t = len(segments.sizes)
        factors = grad.reshape(t, -1, grad.shape[-1]).mT, x.reshape(t, -1, x.shape[-1])
        if out.numel() <= _SMALL * t:
            out.copy_(torch.bmm(*factors))
        else:
            torch.bmm(*factors, out=out)
        return
    for mine, theirs, row in zip(segments.split(grad), segments.split(x), out, strict=True):
        torch.mm(mine.flatten(0, 1).mT, theirs.flatten(0, 1), out=row)
