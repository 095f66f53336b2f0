"""How each type of module yields its parameters' gradients per task; one file per family of layers."""

from torch import nn
from torch.nn.utils import parametrize

from gem_fast.task_gradients.recording import CannotFuse, Rule
from gem_fast.task_gradients.rules.attention import attention
from gem_fast.task_gradients.rules.convolution import convolution
from gem_fast.task_gradients.rules.embedding import embedding
from gem_fast.task_gradients.rules.linear import linear
from gem_fast.task_gradients.rules.normalisation import normalisation
from gem_fast.task_gradients.rules.segmented import segmented

__all__ = ["convolution", "units"]

# By exact type: a subclass may compute something else.
RULES: dict[type[nn.Module], Rule] = {
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


def units(model: nn.Module) -> list[tuple[nn.Module, Rule]]:
    """The model's modules that rules apply to: the outermost ones that own parameters.

    Raises:
        CannotFuse: the model itself owns parameters, or a module is compiled.
    """
    found: dict[nn.Module, Rule] = {}
    _collect(model, found)
    if model in found and found[model] is segmented:
        raise CannotFuse(f"parameters belong to {type(model).__name__} itself, not to one of its layers")
    for module in model.modules():
        if module._compiled_call_impl is not None:
            raise CannotFuse(f"{type(module).__name__} is compiled")
    return list(found.items())


def _collect(module: nn.Module, found: dict[nn.Module, Rule]) -> None:
    rule = RULES.get(type(module))
    if rule is not None:
        found[module] = rule
    elif isinstance(module, _PER_BATCH) or _owns_parameters(module):
        found[module] = segmented
    else:
        for child in module.children():
            _collect(child, found)


def _owns_parameters(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) or any(p is not None for p in module._parameters.values())
