"""Models with torch.utils.checkpoint(use_reentrant=True), through which only `.backward()` gets.

It adds to the `.grad` of all leaves that it comes to, so that there must be others in the parameters' place.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.gradients.interface import Objective

REASON = (
    "torch.utils.checkpoint runs with use_reentrant=True; with use_reentrant=False one pass can take all past tasks"
)

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_used_by(model: nn.Module) -> bool:
    """Whether a backward through the model has been found to need this."""
    return model in _models


def found_in(model: nn.Module) -> None:
    """Notes that `is_reason_of` an error of the model."""
    _models.add(model)


def is_reason_of(error: Exception) -> bool:
    """Whether torch.autograd.grad failed for this reason; the words are torch's, and those of older versions of it."""
    said = str(error)
    return isinstance(error, RuntimeError) and "heckpoint" in said and ".grad()" in said


@contextmanager
def copies_in_place(objective: Objective, parameters: Sequence[Parameter]) -> Iterator[list[Tensor]]:
    """Puts a leaf of the same values in the place of each trained parameter of the model, and of a loss with some.

    Hooks on the gradient of a parameter hold for its copy, too; what runs after a gradient was accumulated does not:
    optimizers in the backward, DistributedDataParallel.

    Yields:
        For each of `parameters` its copy; a parameter that is in no module is itself one, its `.grad` put back after.
    """
    loss = objective.loss_fn
    modules = [*objective.model.modules(), *(loss.modules() if isinstance(loss, nn.Module) else ())]
    places = [(module, name, p) for module in modules for name, p in module._parameters.items() if p is not None]
    copies: dict[Tensor, Tensor] = {}
    for _, _, parameter in places:
        if parameter.requires_grad and parameter not in copies:
            copy = copies[parameter] = parameter.detach().requires_grad_()
            for hook in (parameter._backward_hooks or {}).values():
                copy.register_hook(hook)
    before = [(parameter, parameter.grad) for parameter in parameters if parameter not in copies]
    try:
        for module, name, parameter in places:
            module._parameters[name] = copies.get(parameter, parameter)
        for parameter, _ in before:
            parameter.grad = None
        yield [copies.get(parameter, parameter) for parameter in parameters]
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
        for parameter, grad in before:
            parameter.grad = grad
