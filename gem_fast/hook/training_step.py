"""What `GEM.step` does beside Algorithm 1: clears gradients, goes backward, has the optimizer step."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gem_fast.containers import Objects, map_tensors, structure, tensors
from gem_fast.gradients import Batch, Objective
from gem_fast.hook.checks import trained_parameters
from gem_fast.hook.cuda_graph import Graphed
from gem_fast.projection import Projection


class Done(NamedTuple):
    """What a step leaves behind, the same tensors each time where it comes from a CUDA graph."""

    loss: Tensor
    last: Projection | None
    grads: list[Tensor | None]


class TrainingStep:
    """A step with one mini-batch, from its gradient to the optimizer's step, whose pre-hook projects.

    Args:
        objective: the model as the user has it, and its loss.
        together: computes the mini-batch's gradient beside G and returns the loss, or None where it cannot.
        cuda_graph: whether whole steps may come from a CUDA graph.

    Attributes:
        accumulates: whether the next gradient is added to those that are there.
        is_graphed: whether what runs is, or may become, part of a graph of the whole step.
    """

    def __init__(
        self, objective: Objective, together: Callable[[Batch], Tensor | None], *, cuda_graph: bool = False
    ) -> None:
        self.accumulates = False
        self.is_graphed = False
        self.graphed: Graphed[Done] | None = Graphed("the whole step", in_place=False) if cuda_graph else None
        self._objective = objective
        self._together = together

    @property
    def model(self) -> torch.nn.Module:
        """As the user has it."""
        return self._objective.model

    def run(self, optimizer: Any, current: Batch, *, update: bool, scaler: torch.amp.GradScaler | None) -> Tensor:
        """The step by itself; returns the loss. For the arguments see `GEM.step`; optimizer: as the user has it."""
        if not self.accumulates:
            optimizer.zero_grad()
        scales = scaler is not None and scaler.is_enabled()
        loss = self._together(current) if update and not scales else None
        if loss is None:
            with torch.enable_grad():
                loss = self._objective.loss(current)
                (loss if scaler is None else scaler.scale(loss)).backward()
        self.accumulates = not update
        if update and scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        elif update:
            optimizer.step()
        return loss.detach()

    def run_graphed(
        self,
        optimizer: Optimizer,
        current: Batch,
        kind: Hashable,
        last: Callable[[], Projection | None],
        generators: Sequence[torch.Generator],
    ) -> Done | None:
        """The step from a CUDA graph; the first of each kind run by themselves. None: there is to be no graph.

        Args:
            optimizer: the one that is hooked.
            current: the mini-batch.
            kind: see `kind_of`, for all but the mini-batch and the optimizer.
            last: what the projection of the step that ran last did.
            generators: what it draws from beside torch's own.
        """
        assert self.graphed is not None
        parameters, given = trained_parameters(optimizer), tensors([current.x, current.y])

        def run(static: list[Tensor]) -> Done:
            loss = self.run(optimizer, _with_tensors(current, static), update=True, scaler=None)
            return Done(loss, last(), [p.grad for p in parameters])

        obstacle = _obstacle(optimizer, current)
        self.is_graphed = True
        try:
            done = self.graphed(
                run,
                given,
                (kind, _kind_of(current), _options(optimizer), obstacle),
                parameters=parameters,
                generators=generators,
                obstacle=obstacle,
            )
        finally:
            self.is_graphed = False
        for p, grad in zip(parameters, done.grads if done is not None else [], strict=done is not None):
            p.grad = grad
        return done


def _with_tensors(batch: Batch, given: list[Tensor]) -> Batch:
    """The same with other tensors."""
    rest = iter(given)
    x = map_tensors(lambda _: next(rest), batch.x)
    return batch._replace(x=x, y=map_tensors(lambda _: next(rest), batch.y))


def _kind_of(batch: Batch) -> Hashable:
    nests = batch.x, batch.y
    shapes = tuple((x.shape, x.dtype, x.device) for x in tensors(nests) if isinstance(x, Tensor))
    descriptor = tuple(x.data_ptr() for x in tensors(batch.descriptor))
    return batch.task, tuple(map(structure, nests)), shapes, descriptor


def _options(optimizer: Optimizer) -> Hashable:
    """The learning rate and all else that a step takes from the host; tensors are read on the device."""
    return tuple(
        (name, id(value) if isinstance(value, Tensor) else repr(value))
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params"
    )


def _obstacle(optimizer: Optimizer, current: Batch) -> str | None:
    name = type(optimizer).__name__
    if not all(group.get("capturable", type(optimizer) is torch.optim.SGD) for group in optimizer.param_groups):
        return f"{name} is neither SGD nor made with capturable=True, so the memory pass alone is captured"
    if len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks) > 2:
        return f"{name} has step hooks beside this one, so the memory pass alone is captured"
    if any(isinstance(x, Objects) for x in tensors(current.x)):
        return "the examples are objects that collate_fn puts together, so the memory pass alone is captured"
    return None
