"""Convolutions and transposed ones, of any stride, padding, dilation and number of groups."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gem_fast.gradients.fused.recorder import Recorder, features_of
from gem_fast.gradients.fused.task_batch import TaskSizes

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def convolution(
    recorder: Recorder, module: Convolution, forward: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """The weight's gradient is a convolution of a task's inputs with its output gradients."""
    x, dim = recorder.per_example(module, input)
    output = forward(x, *args, **kwargs)
    # Some paddings are not the convolution's own: such inputs are padded first, as the module does.
    pads_itself = isinstance(module.padding, str) or module.padding_mode != "zeros"
    write = partial(_write_weight, module, pads_itself, x.detach())
    # The maps of a group, and those of a transposed convolution, cannot be told apart by the output's alone.
    restrict = None if module.transposed or module.groups > 1 else features_of(write, 1)
    recorder.use(module.weight, output, dim, write, module=module, reads=input, restrict=restrict)
    recorder.use(module.bias, output, dim, _write_bias, module=module, restrict=features_of(_write_bias, 1))
    return output


def _write_weight(
    module: Convolution, pads_itself: bool, x: Tensor, grad: Tensor, tasks: TaskSizes, out: Tensor
) -> None:
    padding: Any = module.padding
    if pads_itself:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = [0] * len(module.stride)
    # The transposed convolution's weight is that of the convolution from its outputs back to its inputs.
    before, after = (grad, x) if module.transposed else (x, grad)
    for theirs, mine, row in zip(tasks.split(before), tasks.split(after), out, strict=True):
        _, weight, _ = torch.ops.aten.convolution_backward(
            mine,
            theirs,
            row,  # for its shape
            None,
            list(module.stride),
            list(padding),
            list(module.dilation),
            False,
            [0] * len(module.stride),
            module.groups,
            [False, True, False],
        )
        row.copy_(weight)


def _write_bias(grad: Tensor, tasks: TaskSizes, out: Tensor) -> None:
    tasks.sum(grad.flatten(2).sum(2), out)
