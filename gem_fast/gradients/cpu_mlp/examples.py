"""Steps with samples of the memory, for linear layers with ReLU between them: pass and projection are one operator.

q, and g~ where it can, come from inner products of examples, as in the layerwise form. Where t m' examples are few, P
does, too, and no row of G is written. Else the operator writes rows, in a layout of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.gradients.fused.task_batch import TaskBatch, TaskSizes
from gem_fast.gradients.interface import JointPass
from gem_fast.gradients.rows import by_parameter, rows_for
from gem_fast.solver import Status

# What a multiplication takes where it is of an entry that is not zero, or of rows, which are written and read, in units
# of one in a dense product of examples (measured for t = 2 to 19 and m' = 4 to 24).
_SPARSE, _OF_ROWS = 3.0, 1.7


class MlpPlan:
    """What is the same in all passes through these layers.

    Args:
        layers: of a model that is these layers and nothing else.
        parameters: those whose gradients make up a row of G, in order.
    """

    def __init__(self, layers: Sequence[nn.Linear], parameters: Sequence[Parameter]) -> None:
        self.parameters = list(parameters)
        self.weights: list[Tensor] = [layer.weight for layer in layers]
        self.biases: list[Tensor | None] = [layer.bias for layer in layers]
        own = {*self.weights, *self.biases}
        self.depends = [parameter in own for parameter in parameters]
        self.nothing = self.weights[0].new_empty(0)
        place: dict[Tensor, int] = {parameter: i for i, parameter in enumerate(parameters)}
        self._places = [
            [place.get(p, -1) if p is not None else -1 for p in some] for some in (self.weights, self.biases)
        ]
        self._others = [i for i, mine in enumerate(self.depends) if not mine]
        self.shapes = [shape for k, w in enumerate(self.weights) for shape in ([len(w)] if k == 0 else w.shape)]
        self._width = sum(map(padded, self.shapes))
        self._kept = self.nothing

    def kept(self, examples: int) -> Tensor:
        """The memory for what a pass of so many examples leaves behind, the same one each time."""
        if self._kept.numel() != examples * self._width:
            self._kept = self.nothing.new_empty(examples * self._width)
        return self._kept

    def new_gradients(self) -> list[Tensor | None]:
        """Room for a gradient of each parameter; None where the loss does not depend on it."""
        return [
            torch.empty_like(p, memory_format=torch.contiguous_format) if used else None
            for p, used in zip(self.parameters, self.depends, strict=True)
        ]

    def split(self, grads: Sequence[Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of the weights, of the biases, empty ones where they are not wanted, and of other parameters."""
        nothing, (weights, biases) = self.nothing, self._places
        return (
            [nothing if i < 0 else grads[i] for i in weights],
            [nothing if i < 0 else grads[i] for i in biases],
            [grads[i] for i in self._others],
        )


class SamplePlan(MlpPlan):
    """What is the same in all passes of samples of these sizes.

    Args:
        layers: as for `MlpPlan`.
        parameters: likewise.
        batch: the first of these samples.
    """

    def __init__(self, layers: Sequence[nn.Linear], parameters: Sequence[Parameter], batch: TaskBatch) -> None:
        super().__init__(layers, parameters)
        self.sizes, self.total = batch.tasks.sizes, batch.tasks.total
        self._inputs, self._targets = batch.inputs, batch.targets
        row = sum((weight.shape[1] + 1) * padded(len(weight)) for weight in self.weights)
        is_by_products = _products_cost_less(self.weights, batch)
        self.rows = self.nothing if is_by_products else self.nothing.new_empty((len(self.sizes) + 1) * row)

    def serves(self, batch: TaskBatch) -> bool:
        """Whether this is the plan for a sample of the same memory, as many of each task."""
        is_same = batch.inputs is self._inputs and batch.targets is self._targets
        return is_same and batch.tasks.sizes == self.sizes

    def input(self, batch: TaskBatch) -> tuple[Tensor | None, Sequence[Tensor], Tensor | None]:
        """The first layer's input, as operators take it."""
        if batch.entries is None:  # the sample is a copy, of which all count
            return batch.x.flatten(1).contiguous(), [], None
        return None, batch.entries.by_rows, batch.positions

    def targets(self, batch: TaskBatch) -> Tensor:
        """Of the examples that `input` is about: of a memory's all."""
        targets: Tensor = batch.y if batch.entries is None else batch.targets
        return targets


class ExampleGradients:
    """`TaskGradients` from a pass over a sample, with rows of the parameters' layout for those who ask for them.

    Args:
        plan: the pass's plan, in whose memory it leaves what G follows from.
        batch: the sample.
        of_step: the number of examples of the mini-batch that took part in the pass, where `step_pass` has made it.
    """

    def __init__(self, plan: SamplePlan, batch: TaskBatch, *, of_step: int = 0) -> None:
        self.depends = plan.depends
        self._plan = plan
        self._batch = batch
        self._rows = batch.tasks.total + of_step
        self._kept = plan.kept(self._rows)
        self._is_of_step = of_step > 0
        if not self._is_of_step:
            torch.ops.gem_fast._mlp_examples_(
                self._kept, *plan.input(batch), plan.targets(batch), plan.weights, plan.biases, plan.sizes
            )

    def project_(self, grads: Sequence[Tensor], margin: float, ridge: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The projection (v, q, status, residual) of g, in place; `grads` are the parameters' gradients."""
        plan = self._plan
        if not self._is_of_step and all(grad.is_contiguous() for grad in grads):
            projected: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.gem_fast._mlp_project_(
                *plan.split(grads),
                self._kept,
                *plan.input(self._batch),
                plan.weights,
                plan.sizes,
                margin,
                ridge,
                plan.rows,
            )
            if projected[2].item() != Status.NON_FINITE:  # of which rows say where
                return projected
        by_rows: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.gem_fast.project_(list(grads), self.G, margin, ridge)
        return by_rows

    def gram(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `TaskGradients.gram`."""
        P, q = torch.ops.gem_fast.gram(self.G, list(grads), False)
        return P, q

    def combine_(self, grads: Sequence[Tensor], v: Tensor) -> None:
        """As `TaskGradients.combine_`."""
        torch.ops.gem_fast.combine_(list(grads), self.G, v)

    @cached_property
    def G(self) -> Tensor:
        """(t, p): the rows."""
        return self.rows(slice(0, len(self._plan.sizes)))

    def rows(self, some: slice) -> Tensor:
        """(n, p): the rows of n tasks."""
        plan, sizes = self._plan, TaskSizes(self._plan.sizes[some])
        first = sum(plan.sizes[: some.start])
        mine = slice(first, first + sizes.total)
        G = rows_for(len(sizes), plan.parameters)
        blocks: dict[Tensor, Tensor] = dict(zip(plan.parameters, by_parameter(G, plan.parameters), strict=True))
        planes = [
            plane.view(self._rows, -1)[mine]
            for plane in self._kept.split([self._rows * padded(columns) for columns in plan.shapes])
        ]
        deltas, inputs = [planes[0], *planes[1::2]], planes[2::2]
        dense, entries, positions = plan.input(self._batch)
        given = (
            None if dense is None else dense[mine],
            entries,
            None if positions is None else positions[mine],
        )
        for k, (weight, bias, delta) in enumerate(zip(plan.weights, plan.biases, deltas, strict=True)):
            if weight in blocks:
                x = given if k == 0 else (inputs[k - 1][:, : weight.shape[1]], [], None)
                torch.ops.gem_fast._layer_gradient_(blocks[weight], delta, *x, sizes.sizes)
            if bias in blocks:
                sizes.sum(delta[:, : len(weight)], blocks[bias])
        for i in plan._others:
            blocks[plan.parameters[i]].zero_()
        return G


def step_pass(plan: SamplePlan, batch: TaskBatch, current: TaskBatch, margin: float, ridge: float) -> JointPass:
    """One pass through a sample and the current mini-batch, whose gradient it projects where it can.

    Args:
        plan: the sample's.
        batch: the sample.
        current: the mini-batch, whose targets are classes.
        margin: as for `project_`.
        ridge: likewise.
    """
    n = current.tasks.total
    of_sample = *plan.input(batch), plan.targets(batch), plan.weights, plan.biases, plan.sizes
    grads, loss, projection = _step(plan, plan.kept(plan.total + n), of_sample, current, margin, ridge, plan.rows)
    done = projection[2].item() != Status.NON_FINITE
    return JointPass(ExampleGradients(plan, batch, of_step=n), grads, loss, projection if done else None)


def alone_pass(plan: MlpPlan, current: TaskBatch) -> tuple[list[Tensor | None], Tensor]:
    """The gradients of the current mini-batch alone, and its loss: a step without past tasks."""
    no_sample: tuple[Any, ...] = (
        current.x[:0].flatten(1),
        [],
        None,
        current.targets[:0],
        plan.weights,
        plan.biases,
        [],
    )
    grads, loss, _ = _step(plan, plan.kept(current.tasks.total), no_sample, current, 0.0, 0.0, plan.nothing)
    return grads, loss


def _step(
    plan: MlpPlan,
    kept: Tensor,
    of_sample: tuple[Any, ...],
    current: TaskBatch,
    margin: float,
    ridge: float,
    rows: Tensor,
) -> tuple[list[Tensor | None], Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    grads = plan.new_gradients()
    weight_grads, bias_grads, _ = plan.split(grads)
    x = current.x.flatten(1).contiguous()
    loss, *projection = torch.ops.gem_fast._mlp_step_(
        kept, *of_sample, x, current.targets, weight_grads, bias_grads, margin, ridge, rows
    )
    v, q, status, residual = projection
    return grads, loss, (v, q, status, residual)


def padded(columns: int) -> int:
    """The length of a row of so many elements that ends with a cache line."""
    return (columns + 15) // 16 * 16


def _products_cost_less(weights: Sequence[Tensor], batch: TaskBatch) -> bool:
    t, n = len(batch.tasks), batch.tasks.total
    products = rows = 0.0
    for k, weight in enumerate(weights):
        outputs, inputs = weight.shape
        per_row: float = inputs
        if k == 0 and batch.entries is not None:
            per_row = _SPARSE * len(batch.entries.by_rows[1]) / len(batch.targets)
        products += n * n / 2 * (per_row + outputs) + 2 * n * per_row * outputs
        rows += n * per_row * outputs + (t * (t + 1) / 2 + 2 * t) * inputs * outputs
    return products <= _OF_ROWS * rows
