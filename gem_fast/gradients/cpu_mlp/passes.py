"""Passes through linear layers with ReLU between them, on a CPU: one backward of our own through all of them.

It goes task by task, so that a task's activations stay in the cache. A model that is nothing else goes forward there,
too, and needs no autograd at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from gem_fast.gradients.rows import by_parameter


class MlpPass:
    """A pass from which the gradients of all its tasks are formed.

    Args:
        weights: of the layers, first layer first.
        biases: likewise.
        given: the first layer's input.
        sizes: the number of examples of each task.
        run: run(weight_rows, bias_rows, sizes) writes the rows of all weights but the first, and of all biases, and
            returns the gradient at the first layer's output: (N, outputs), with zeros up to whole cache lines.
    """

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor | None],
        given: LayerInput,
        sizes: list[int],
        run: Callable[[list[Tensor], list[Tensor], list[int]], Tensor],
    ) -> None:
        self.weights, self.biases = weights, biases
        self._input = given
        self._sizes = sizes
        self._run = run
        self._rows: _Rows | None = None  # where it wrote last
        self._depends: tuple[Sequence[Parameter], list[bool]] | None = None

    def depends(self, parameters: Sequence[Parameter]) -> list[bool]:
        """For each of these parameters, whether it is one of the layers'."""
        if self._depends is None or self._depends[0] is not parameters:
            own = {*self.weights, *self.biases}
            self._depends = parameters, [parameter in own for parameter in parameters]
        return self._depends[1]

    def write(self, G: Tensor, parameters: Sequence[Parameter]) -> None:
        """Writes the rows of G (t, p) of the pass's tasks."""
        if self._rows is None or self._rows.G is not G:
            self._rows = self._rows_of(G, parameters)
        rows = self._rows
        for block in rows.others:
            block.zero_()
        delta = self._run(rows.weights, rows.biases, self._sizes)
        if rows.first is not None:
            torch.ops.gem_fast._layer_gradient_(rows.first, delta, *self._input, self._sizes)

    def _rows_of(self, G: Tensor, parameters: Sequence[Parameter]) -> _Rows:
        blocks: dict[Tensor, Tensor] = dict(zip(parameters, by_parameter(G, parameters), strict=True))
        nothing = self.weights[0].new_empty(0)
        return _Rows(
            G,
            blocks.get(self.weights[0]),
            [blocks.get(weight, nothing) for weight in self.weights[1:]],
            [nothing if bias is None else blocks.get(bias, nothing) for bias in self.biases],
            [blocks[parameter] for parameter in blocks.keys() - {*self.weights, *self.biases}],
        )


class _Rows(NamedTuple):
    """The parts of G, each for one parameter."""

    G: Tensor
    first: Tensor | None  # of the first weight, where it is wanted
    weights: list[Tensor]  # of the others; empty ones where they are not
    biases: list[Tensor]
    others: list[Tensor]  # on which the losses do not depend


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
    return MlpPass(weights, biases, LayerInput.of(x, entries, positions), batch.tasks.sizes, run)


def recorded_pass(recorder: Recorder, roots: Sequence[LossRoot], batch: TaskBatch) -> MlpPass | None:
    """A pass whose forward is recorded; None where more than such layers is behind the outputs.

    Raises:
        CannotFuse: the model changed a layer's input in place.
    """
    output = roots[0].output
    calls = find_mlp(recorder.linear_calls, output) if len(roots) == 1 and isinstance(output, Tensor) else None
    if calls is None:
        return None
    recorder.check_unchanged()
    first, *others = calls
    weights = [call.weight for call in calls]
    run = partial(torch.ops.gem_fast._mlp_backward, roots[0].gradient(), [call.x for call in others], weights)
    given = LayerInput.of(first.x, first.entries, first.positions)
    return MlpPass(weights, [call.bias for call in calls], given, batch.tasks.sizes, run)
