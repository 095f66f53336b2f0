"""Passes through linear layers with ReLU between them, on a CPU: one backward of our own through all of them.

It goes task by task, so that a task's activations stay in the cache. A model that is nothing else goes forward there,
too, and needs no autograd at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.gradients.cpu_mlp.recognition import find_mlp, is_whole
from gem_fast.gradients.fused.entries import LayerInput
from gem_fast.gradients.fused.losses import LossRoot
from gem_fast.gradients.fused.recorder import Recorder
from gem_fast.gradients.fused.task_batch import TaskBatch
from gem_fast.gradients.layerwise import InnerProducts, LayerwiseGradients, Part, products_are_cheaper
from gem_fast.gradients.rows import RowGradients, by_parameter


class MlpPass(NamedTuple):
    """A pass from which the gradients of all its tasks are formed."""

    weights: list[Tensor]
    """Of the layers, first layer first."""
    biases: list[Tensor | None]
    input: LayerInput
    """The first layer's."""
    batch: TaskBatch
    run: Callable[[list[Tensor], list[Tensor], list[int]], Tensor]
    """run(weight_rows, bias_rows, sizes): see `_write_all_but_first`."""

    def depends(self, parameters: Sequence[Parameter]) -> list[bool]:
        """For each of these parameters, whether it is one of the layers'."""
        own = {*self.weights, *self.biases}
        return [parameter in own for parameter in parameters]

    @torch.no_grad()
    def write(self, G: Tensor, parameters: Sequence[Parameter]) -> None:
        """Writes the rows of G (t, p) of the pass's tasks."""
        blocks: dict[Tensor, Tensor] = dict(zip(parameters, by_parameter(G, parameters), strict=True))
        delta = self._write_all_but_first(blocks)
        if self.weights[0] in blocks:
            sizes = self.batch.tasks.sizes
            torch.ops.gem_fast._layer_gradient_(blocks[self.weights[0]], delta, *self.input, sizes)

    @torch.no_grad()
    def layerwise(self, parameters: Sequence[Parameter], spare: RowGradients) -> LayerwiseGradients | None:
        """The first weight as inner products of examples and the others as rows; None where rows are cheaper.

        Args:
            parameters: in the order in which they make up a row.
            spare: takes the rows.
        """
        weight, t = self.weights[0], len(self.batch.tasks)
        first = next((i for i, parameter in enumerate(parameters) if parameter is weight), None)
        if first is None or not products_are_cheaper(self.batch.tasks.total, t, weight.shape):
            return None
        others = [i for i in range(len(parameters)) if i != first]
        others_of = [parameters[i] for i in others]
        spare.begin_step(list(range(t)), others_of)
        delta = self._write_all_but_first(dict(zip(others_of, by_parameter(spare.G, others_of), strict=True)))
        products = InnerProducts(self.batch.x.flatten(1), delta[:, : len(weight)], [(0, self.batch.tasks)], t)
        return LayerwiseGradients([Part([first], products), Part(others, spare)], self.depends(parameters), t)

    def _write_all_but_first(self, blocks: Mapping[Tensor, Tensor]) -> Tensor:
        """Writes the rows of all parameters but the first weight.

        Args:
            blocks: for each parameter whose gradient is wanted, the (t, ...) part of G's rows that is its own.

        Returns:
            (N, outputs), with zeros up to whole cache lines: the gradient at the first layer's output.
        """
        nothing = self.weights[0].new_empty(0)
        for parameter in blocks.keys() - {*self.weights, *self.biases}:
            blocks[parameter].zero_()
        return self.run(
            [blocks.get(weight, nothing) for weight in self.weights[1:]],
            [nothing if bias is None else blocks.get(bias, nothing) for bias in self.biases],
            self.batch.tasks.sizes,
        )


def whole_pass(layers: Sequence[nn.Linear], model: nn.Module, batch: TaskBatch) -> MlpPass | None:
    """A pass, forward and all, through a model that is these layers (`mlp_layers`) and nothing else."""
    if not is_whole(layers, model, batch):
        return None
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor | None] = [layer.bias for layer in layers]
    entries, positions = batch.entries, batch.positions
    x = batch.x.flatten(1).contiguous() if entries is None else None
    given = [] if entries is None else entries.row_pairs if positions is None else entries.by_rows
    run = partial(torch.ops.gem_fast._mlp_pass, x, given, positions, batch.y, weights, biases)
    return MlpPass(weights, biases, LayerInput.of(x, entries, positions), batch, run)


def recorded_pass(recorder: Recorder, roots: Sequence[LossRoot], batch: TaskBatch) -> MlpPass | None:
    """A pass whose forward is recorded; None where more than such layers is behind the outputs.

    Raises:
        CannotFuse: the model changed a layer's input in place.
    """
    calls = find_mlp(recorder.linear_calls, roots[0].output) if len(roots) == 1 else None
    if calls is None:
        return None
    recorder.check_unchanged()
    first, *others = calls
    weights = [call.weight for call in calls]
    run = partial(torch.ops.gem_fast._mlp_backward, roots[0].gradient(), [call.x for call in others], weights)
    given = LayerInput.of(first.x, first.entries, first.positions)
    return MlpPass(weights, [call.bias for call in calls], given, batch, run)
