"""Modules in a call with one task's examples alone: their input may be the same for all of these.

A network that makes another one's weights of the task's descriptor (a hypernetwork), or a scale and a shift, gets an
input that has no dimension for examples. Whatever its dimensions are, the parameters' gradients are the task's.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gem_fast.gradients.fused.recorder import Recorder, Rule
from gem_fast.gradients.fused.rules.embedding import embedding
from gem_fast.gradients.fused.rules.linear import conv1d, linear
from gem_fast.gradients.fused.rules.normalisation import normalisation
from gem_fast.gradients.fused.rules.once_per_task import once_per_task
from gem_fast.gradients.fused.rules.own_rms_norm import own_rms_norm
from gem_fast.gradients.restore import parameters_replaced

# They treat all positions of an input alike: the whole input may stand for one example.
_BY_POSITION = (linear, conv1d, embedding, normalisation, own_rms_norm)


def with_one_task(
    rule: Rule, recorder: Recorder, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """What the rule gives; for an input without examples that of one example, or of autograd where there is none."""
    x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    total = recorder.tasks.total
    if rule is once_per_task or x is None:
        return _by_autograd(recorder, module, forward, *args, **kwargs)
    dim = _examples_dim(module, x)
    if dim is not None and max(1, dim) < x.dim() and x.shape[dim] == total:
        with recorder.examples_along(dim, total):
            return rule(recorder, module, forward, *args, **kwargs)
    if rule in _BY_POSITION and not isinstance(module, nn.GroupNorm) and len(args) + len(kwargs) == 1:
        with recorder.examples_along(0, 1):
            return rule(recorder, module, forward, x.unsqueeze(0)).squeeze(0)
    if dim is None and total in x.shape[:2]:
        return rule(recorder, module, forward, *args, **kwargs)
    return _by_autograd(recorder, module, forward, *args, **kwargs)


def _examples_dim(module: nn.Module, x: Tensor) -> int | None:
    """The dimension of x that runs over the examples, if any does; None where it is not known."""
    if isinstance(module, nn.MultiheadAttention):
        return 0 if module.batch_first else 1
    if isinstance(module, nn.modules.conv._ConvNd):
        return 0 if x.dim() == len(module.kernel_size) + 2 else x.dim()
    return 0 if isinstance(module, (nn.Linear, nn.GroupNorm)) else None


def _by_autograd(recorder: Recorder, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    wanted = recorder.wanted(module)
    aliases = {parameter: parameter.detach().requires_grad_() for _, _, parameter in wanted}
    with parameters_replaced([(owner, name, aliases[parameter]) for owner, name, parameter in wanted]):
        output = forward(*args, **kwargs)
    for parameter, alias in aliases.items():
        recorder.use_alias(parameter, alias, 0)
    return output
