"""Gradients at copies of the parameters, where a backward must not come to the parameters themselves."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.gradients.interface import Objective
from gem_fast.gradients.restore import grads_set_aside, parameters_replaced


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
    with grads_set_aside(leaves):
        if loss.requires_grad:
            loss.backward()
        return [leaf.grad for leaf in leaves]


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
    trained = [
        (module, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    copies: dict[Tensor, Tensor] = {}
    for _, _, parameter in trained:
        if parameter not in copies:
            copy = copies[parameter] = parameter.detach().requires_grad_()
            for hook in (parameter._backward_hooks or {}).values():
                copy.register_hook(hook)
    with parameters_replaced([(module, name, copies[parameter]) for module, name, parameter in trained]):
        yield copies
