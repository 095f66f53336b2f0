"""RMS normalisations of other libraries: y = w x^ or (1 + w) x^, with x^ the input over its root mean square."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gem_fast.gradients.fused.recorder import Recorder
from gem_fast.gradients.fused.rules.bias import write_bias
from gem_fast.gradients.fused.rules.once_per_task import once_per_task
from gem_fast.gradients.fused.task_batch import TaskSizes
from gem_fast.gradients.restore import parameters_replaced


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is one, by its name and by having one parameter, (features,), and nothing else."""
    if not type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")) or module._modules:
        return False
    parameters = module._parameters
    return list(parameters) == ["weight"] and parameters["weight"] is not None and parameters["weight"].dim() == 1


def own_rms_norm(
    recorder: Recorder, module: nn.Module, forward: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """dL/dw = sum over the examples and positions of dL/dy x^."""
    if args or kwargs:  # a gate, say
        output: Tensor = once_per_task(recorder, module, forward, input, *args, **kwargs)
        return output
    x, dim = recorder.per_example(module, input)
    output = forward(x)

    def write(grad: Tensor, tasks: TaskSizes, out: Tensor) -> None:
        # What is normalised in which precision differs from library to library: their own forward knows.
        one, zero = (_with_weight(module, forward, x.detach(), value) for value in (1.0, 0.0))
        write_bias(grad * (one - zero).transpose(0, dim), tasks, out)

    recorder.use(module._parameters["weight"], output, dim, write, module=module, reads=x)
    return output


def _with_weight(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, value: float) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    with parameters_replaced([(module, "weight", torch.full_like(weight, value))]):
        return forward(x)
