"""Normalisations of single examples: y = w x^ + b, with x^ the normalised input."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from gem_fast.gradients.fused.recorder import Recorder
from gem_fast.gradients.fused.task_batch import TaskSizes

Normalisation = nn.LayerNorm | nn.GroupNorm | nn.RMSNorm


def normalisation(
    recorder: Recorder, module: Normalisation, forward: Callable[[Tensor], Tensor], input: Tensor
) -> Tensor:
    """dL/dw = sum over the examples (and positions) of dL/dy x^, dL/db = that of dL/dy."""
    x, dim = recorder.per_example(module, input)
    output = forward(x)
    bias = getattr(module, "bias", None)
    write = partial(_write_weight, module, x.detach(), dim)
    recorder.use(module.weight, output, dim, write, module=module, reads=input)
    recorder.use(bias, output, dim, partial(_write_sum, module), module=module)
    return output


def _write_weight(module: Normalisation, x: Tensor, dim: int, grad: Tensor, tasks: TaskSizes, out: Tensor) -> None:
    if isinstance(module, nn.GroupNorm):
        normalised = F.group_norm(x, module.num_groups, None, None, module.eps)
    elif isinstance(module, nn.RMSNorm):
        normalised = F.rms_norm(x, module.normalized_shape, None, module.eps)
    else:
        normalised = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    _write_sum(module, grad * normalised.transpose(0, dim), tasks, out)


def _write_sum(module: Normalisation, grad: Tensor, tasks: TaskSizes, out: Tensor) -> None:
    """Sums over everything but the parameter's own dimensions: channels in front, or the last ones."""
    if isinstance(module, nn.GroupNorm):
        tasks.sum(grad.flatten(2).sum(2) if grad.dim() > 2 else grad, out)
        return
    positions = grad.dim() - 1 - len(module.normalized_shape)
    tasks.sum(grad.sum(tuple(range(1, 1 + positions))) if positions else grad, out)
