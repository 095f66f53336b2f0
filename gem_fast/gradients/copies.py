"""Gradients at copies of the parameters, where a backward must not come to the parameters themselves."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.gradients.interface import Objective


def gradients_at_copies(
    objective: Objective, loss_of: Callable[[], Tensor], parameters: Sequence[Parameter], *, by_backward: bool
) -> list[Tensor | None]:
    """The gradient of loss_of() for each parameter; None where the loss does not depend on it.

    Where loss_of() uses a parameter that it has not from the model, both have a part in its gradient.

    Args:
        objective: whose model has the parameters, and whose loss may have some.
        loss_of: computes the loss.
        parameters: whose gradients are wanted.
        by_backward: whether `.backward()` is called, and not torch.autograd.grad; `.grad` is as before.
    """
    with _copies_in_place(objective) as copies:
        leaves = [copies.get(parameter, parameter) for parameter in parameters]
        leaves += [parameter for parameter in parameters if parameter in copies]
        found = (_by_backward if by_backward else gradients)(loss_of(), leaves)
    grads, besides = found[: len(parameters)], iter(found[len(parameters) :])
    return [_sum(grad, next(besides)) if p in copies else grad for p, grad in zip(parameters, grads, strict=True)]


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The loss's gradient for each leaf; None where the loss does not depend on it."""
    if not loss.requires_grad:  # on none of them, because all that it depends on is frozen
        return [None] * len(leaves)
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def _by_backward(loss: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    before = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        if loss.requires_grad:
            loss.backward()
        return [leaf.grad for leaf in leaves]
    finally:
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return x if y is None else y if x is None else x + y


@contextmanager
def _copies_in_place(objective: Objective) -> Iterator[dict[Tensor, Tensor]]:
    """Puts a leaf of the same values in the place of each trained parameter of the model, and of a loss with some.

    Hooks on the gradient of a parameter hold for its copy, too; what runs after a gradient was accumulated does not:
    optimizers in the backward, DistributedDataParallel.
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
    try:
        for module, name, parameter in places:
            module._parameters[name] = copies.get(parameter, parameter)
        yield copies
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
