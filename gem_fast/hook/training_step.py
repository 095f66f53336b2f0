"""What `GEM.step` does beside Algorithm 1: clears gradients, goes backward, has the optimizer step."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from gem_fast.containers import Objects, map_tensors, structure, tensors
from gem_fast.gradients import Batch, Constraint, Engine, Objective, Sample, TaskGradients
from gem_fast.hook import amp
from gem_fast.hook.checks import trained_parameters
from gem_fast.hook.cuda_graph import Graphed, address_of
from gem_fast.projection import Projection


class Done(NamedTuple):
    """What a step leaves behind, the same tensors each time where it comes from a CUDA graph."""

    loss: Tensor
    last: Projection | None
    grads: list[Tensor | None]


class Prepared(NamedTuple):
    """What a step has found out before its projection."""

    parameters: list[Parameter]
    constraints: list[Constraint]
    sample: Sample | None
    margins: tuple[float, float] | None = None
    """As for `Engine.with_current`."""
    G: TaskGradients | None = None
    """None where they are still to be computed."""
    projection: Projection | None = None
    """None where the gradient is still to be projected."""


class TrainingStep:
    """A step with one mini-batch, from its gradient to the optimizer's step, whose pre-hook projects.

    Args:
        objective: the model as the user has it, and its loss.
        of_pass: the model as the passes over the memory call it.
        engine: what computes G.
        prepare: what the coming projection is about, where the mini-batch may be in the engine's pass; else None.
        cuda_graph: whether whole steps may come from a CUDA graph.

    Attributes:
        accumulates: whether the next gradient is added to those that are there.
        is_graphed: whether what runs is, or may become, part of a graph of the whole step.
        prepared: for the projection of the step that runs; None where it finds out by itself.
    """

    def __init__(
        self,
        objective: Objective,
        of_pass: Objective,
        engine: Engine,
        prepare: Callable[[], Prepared | None],
        *,
        cuda_graph: bool = False,
    ) -> None:
        self.accumulates = False
        self.is_graphed = False
        self.prepared: Prepared | None = None
        self.graphed: Graphed[Done] | None = Graphed("the whole step", in_place=False) if cuda_graph else None
        self._objective = objective
        self._of_pass = of_pass
        self._engine = engine
        self._prepare = prepare

    @property
    def model(self) -> torch.nn.Module:
        """As the user has it."""
        return self._objective.model

    def run(self, optimizer: Any, current: Batch, *, update: bool, scaler: torch.amp.GradScaler | None) -> Tensor:
        """The step by itself; returns the loss. For the arguments see `GEM.step`; optimizer: as the user has it."""
        if not self.accumulates:
            _clear_gradients(optimizer)
        scales = scaler is not None and scaler.is_enabled()
        try:
            loss = self._backward_together(current) if update and not scales else None
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
        finally:
            self.prepared = None
        return loss.detach()

    def _backward_together(self, current: Batch) -> Tensor | None:
        """Has one pass leave g in `.grad`, keeps G for the projection and returns the loss; None where none can."""
        self.prepared = prepared = self._prepare()
        if prepared is None:
            return None
        parameters, constraints, sample, margins, *_ = prepared
        joint = self._engine.with_current(self._of_pass, current, constraints, parameters, sample, margins)
        if joint is None:
            return None
        projection = None if joint.projection is None else Projection(*joint.projection)
        self.prepared = Prepared(parameters, constraints, sample, margins, joint.G, projection)
        for p, grad in zip(parameters, joint.grads, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad.add_(grad)
        return joint.loss

    def run_graphed(
        self,
        optimizer: Optimizer,
        current: Batch,
        kind_of_pass: Callable[[Sequence[Parameter]], tuple[Hashable, str | None]],
        last: Callable[[], Projection | None],
        generators: Sequence[torch.Generator],
    ) -> Done | None:
        """The step from a CUDA graph; the first of each kind run by themselves. None: there is to be no graph.

        Args:
            optimizer: the one that is hooked.
            current: the mini-batch.
            kind_of_pass: what a graph stands for, see `kind_of`, and why there can be none.
            last: what the projection of the step that ran last did.
            generators: what it draws from beside torch's own.
        """
        parameters = trained_parameters(optimizer) if self.graphed is not None and not self.accumulates else []
        if self.graphed is None or not parameters or amp.is_on(self.model, parameters[0].device):
            return None
        for p in parameters:
            p.grad = None
        kind, obstacle = kind_of_pass(parameters)
        if obstacle is not None:  # which the memory pass says
            return None
        given = tensors([current.x, current.y])

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


def _clear_gradients(optimizer: Any) -> None:
    """As `optimizer.zero_grad()`, without torch's mark in a profile, which takes longer than all the rest of it."""
    if getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


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
    """The learning rate and all else that a step takes from the host, and the places of what it reads on the device."""
    options = tuple(
        (name, id(value) if isinstance(value, Tensor) else repr(value))
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params"
    )
    # Momentum, say: load_state_dict puts other tensors in its place.
    states = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
    return options, tuple(map(address_of, states))


def _obstacle(optimizer: Optimizer, current: Batch) -> str | None:
    name = type(optimizer).__name__
    if not all(group.get("capturable", type(optimizer) is torch.optim.SGD) for group in optimizer.param_groups):
        return f"{name} is neither SGD nor made with capturable=True, so the memory pass alone is captured"
    if len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks) > 2:
        return f"{name} has step hooks beside this one, so the memory pass alone is captured"
    if any(isinstance(x, Objects) for x in tensors(current.x)):
        return "the examples are objects that collate_fn puts together, so the memory pass alone is captured"
    return None
