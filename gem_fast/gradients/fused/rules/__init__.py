"""How each type of module yields its parameters' gradients per task; one file per family of layers."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from gem_fast.gradients.fused.recorder import CannotFuse, Rule
from gem_fast.gradients.fused.rules.attention import attention
from gem_fast.gradients.fused.rules.convolution import convolution
from gem_fast.gradients.fused.rules.embedding import embedding
from gem_fast.gradients.fused.rules.linear import linear
from gem_fast.gradients.fused.rules.normalisation import normalisation
from gem_fast.gradients.fused.rules.once_per_task import once_per_task

__all__ = ["convolution", "once_per_task", "register_rule", "rules_of"]

R = TypeVar("R", bound=Rule)

# By exact type: a subclass may compute something else.
_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.ConvTranspose1d: convolution,
    nn.ConvTranspose2d: convolution,
    nn.ConvTranspose3d: convolution,
    nn.LayerNorm: normalisation,
    nn.GroupNorm: normalisation,
    nn.RMSNorm: normalisation,
    nn.Embedding: embedding,
    nn.MultiheadAttention: attention,
}

# Modules that look at all examples of a mini-batch, with or without parameters: each task needs a call of its own.
_PER_BATCH = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def register_rule(module_type: type[nn.Module]) -> Callable[[R], R]:
    """A decorator that has the fused pass take a rule for modules of exactly this type.

    ```python
    @gem_fast.register_rule(Scale)  # y = w x, w (features,)
    def scale(recorder, module, forward, input):
        x, dim = recorder.per_example(module, input)
        output = forward(x)

        def write(grad, tasks, out):  # grad (N, features); out (t, features)
            tasks.sum(grad * x.detach(), out)

        recorder.use(module.weight, output, dim, write, module=module, reads=x)
        return output
    ```

    Args:
        module_type: a subclass of nn.Module; its own subclasses need rules of their own.

    Returns:
        The decorator of rule(recorder, module, forward, *args, **kwargs). A rule returns what forward would, and says
        with `recorder.use` how each parameter's gradient follows: `gem_fast.gradients.fused.recorder.Recorder`.
    """

    def register(rule: R) -> R:
        _RULES[module_type] = rule
        return rule

    return register


def rules_of(model: nn.Module) -> list[tuple[nn.Module, Rule]]:
    """The model's modules that rules apply to: the outermost ones that own parameters.

    Raises:
        CannotFuse: the model itself owns parameters, or a module is compiled.
    """
    found: dict[nn.Module, Rule] = {}
    _collect(model, found)
    if model in found and found[model] is once_per_task:
        raise CannotFuse(f"parameters belong to {type(model).__name__} itself, not to one of its layers")
    for module in model.modules():
        if module._compiled_call_impl is not None:
            raise CannotFuse(f"{type(module).__name__} is compiled")
        if isinstance(module, torch.jit.ScriptModule):
            raise CannotFuse(f"{type(module).__name__} is compiled by torch.jit")
    return list(found.items())


def _collect(module: nn.Module, found: dict[nn.Module, Rule]) -> None:
    rule = _RULES.get(type(module))
    if rule is not None:
        found[module] = rule
    elif isinstance(module, _PER_BATCH) or _owns_parameters(module):
        found[module] = once_per_task
    else:
        for child in module.children():
            _collect(child, found)


def _owns_parameters(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) or any(p is not None for p in module._parameters.values())
