"""How each type of module yields its parameters' gradients per task; one file per family of layers."""

from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from gem_fast.gradients.fused.recorder import CannotFuse, Rule
from gem_fast.gradients.fused.rules.attention import attention
from gem_fast.gradients.fused.rules.convolution import convolution
from gem_fast.gradients.fused.rules.embedding import embedding
from gem_fast.gradients.fused.rules.gelu import tanh_gelu
from gem_fast.gradients.fused.rules.linear import conv1d, linear
from gem_fast.gradients.fused.rules.normalisation import normalisation
from gem_fast.gradients.fused.rules.once_per_task import once_per_task
from gem_fast.gradients.fused.rules.one_task import with_one_task
from gem_fast.gradients.fused.rules.own_rms_norm import is_rms_norm, own_rms_norm

__all__ = ["convolution", "once_per_task", "register_rule", "replaces_operators", "rules_of", "with_one_task"]

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

# The same for types of libraries that are not imported here, by their full names.
_RULES_BY_NAME: dict[str, Rule] = {
    "transformers.pytorch_utils.Conv1D": conv1d,
    "transformers.activations.NewGELUActivation": tanh_gelu,
}

# Modules that look at all examples of a mini-batch, with or without parameters: each task needs a call of its own.
_PER_BATCH = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)

# What only holds parameters, for the module around it.
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


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


def rules_of(model: nn.Module, wanted: Collection[Parameter]) -> list[tuple[nn.Module, Rule]]:
    """The model's modules that rules apply to: the outermost ones that own parameters whose gradients are wanted.

    Raises:
        CannotFuse: the model itself owns such parameters, or a module is compiled.
    """
    found: dict[nn.Module, Rule] = {}
    _collect(model, set(wanted), found)
    if model in found and found[model] is once_per_task:
        raise CannotFuse(f"parameters belong to {type(model).__name__} itself, not to one of its layers")
    for module in model.modules():
        if module._compiled_call_impl is not None:
            raise CannotFuse(f"{type(module).__name__} is compiled")
        if isinstance(module, torch.jit.ScriptModule):
            raise CannotFuse(f"{type(module).__name__} is compiled by torch.jit")
    return list(found.items())


def replaces_operators(rule: Rule) -> bool:
    """Whether a rule notes nothing, but computes the same by other operators."""
    return rule is tanh_gelu


def _collect(module: nn.Module, wanted: set[Parameter], found: dict[nn.Module, Rule]) -> None:
    if isinstance(module, _PER_BATCH):
        found[module] = once_per_task
    elif wanted.isdisjoint(module.parameters()):
        # It goes through the pass as it is, but for what looks at a whole mini-batch, and rules that need no parameter.
        for part in module.modules():
            if isinstance(part, _PER_BATCH):
                found[part] = once_per_task
            elif next(part.parameters(), None) is None and (rule := _rule_of(part)) is not None:
                found[part] = rule
    elif (rule := _rule_of(module)) is not None:
        found[module] = rule
    elif _owns(module, wanted):
        found[module] = once_per_task
    else:
        for child in module.children():
            _collect(child, wanted, found)


def _rule_of(module: nn.Module) -> Rule | None:
    kind = type(module)
    rule = _RULES.get(kind) or _RULES_BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
    return own_rms_norm if rule is None and is_rms_norm(module) else rule


def _owns(module: nn.Module, wanted: set[Parameter]) -> bool:
    """Whether it is this module, and none within it, that uses some of the wanted parameters in its forward."""
    if parametrize.is_parametrized(module):
        return True
    children = [child for child in module.children() if not isinstance(child, _CONTAINERS)]
    # A parameter that a child has, too, is tied to the child's, and used there.
    theirs = {parameter for child in children for parameter in child.parameters()}
    held = [module, *(child for child in module.children() if isinstance(child, _CONTAINERS))]
    return any(p in wanted and p not in theirs for owner in held for p in owner.parameters(recurse=False))
