"""Linear layers: y = x W' + b."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gem_fast.task_gradients.pieces import Segments
from gem_fast.task_gradients.recording import WHOLE, Recorder, examples_first, of_features, own_history


def linear(recorder: Recorder, module: nn.Linear, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """dL/dW = sum over the examples (and positions) of dL/dy x', dL/db = that of dL/dy."""
    dim = recorder.examples_dim(module, input)
    output = own_history(forward(input))
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
    cut = of_features(write, -1)
    recorder.use(weight, output, dim, write, module=module, reads=input, part=part, cut=cut)
    recorder.use(bias, output, dim, _write_bias, module=module, part=part, cut=of_features(_write_bias, -1))


def _write_weight(x: Tensor, grad: Tensor, segments: Segments, out: Tensor) -> None:
    x = x.reshape(segments.total, -1, x.shape[-1])
    grad = grad.reshape(segments.total, -1, grad.shape[-1])
    if segments.equal is not None:
        t = len(segments.sizes)
        torch.bmm(grad.reshape(t, -1, grad.shape[-1]).mT, x.reshape(t, -1, x.shape[-1]), out=out)
        return
    for mine, theirs, row in zip(segments.split(grad), segments.split(x), out, strict=True):
        torch.mm(mine.flatten(0, 1).mT, theirs.flatten(0, 1), out=row)


def _write_bias(grad: Tensor, segments: Segments, out: Tensor) -> None:
    if grad.dim() > 2:
        grad = grad.flatten(1, -2).sum(1)
    segments.sum(grad, out)
