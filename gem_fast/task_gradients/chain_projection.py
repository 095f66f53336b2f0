"""The projection for chains of linear layers on a CPU, without the largest part of G.

A task's gradient of the first layer's weight is delta' x, for the layer's inputs x and the gradients delta at its
outputs. Blocks of it are formed for all tasks, read, and gone; the rows of G hold the other parameters only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from gem_fast.projection import Projection, project_
from gem_fast.task_gradients.fused import FusedTaskGradients
from gem_fast.task_gradients.protocol import Batch, Sample
from gem_fast.task_gradients.rows import Blocks, enough_rows


class ChainProjection:
    """Projects like `project_` on the rows of an engine, where these come from one pass through a chain.

    Args:
        engine: goes through the model.
    """

    def __init__(self, engine: FusedTaskGradients) -> None:
        self._engine = engine
        self._blocks = Blocks()
        self._G: Tensor | None = None

    def __call__(
        self,
        constraints: Sequence[Sequence[Batch]],
        parameters: Sequence[Parameter],
        grads: Sequence[Tensor],
        margin: float = 0.5,
        ridge: float = 0.0,
        *,
        sample: Sample | None = None,
    ) -> tuple[Projection, list[bool]] | None:
        """Projects `grads` in place.

        Args:
            constraints: t lists of batches.
            parameters: whose gradients they are.
            grads: one tensor per parameter, of its shape.
            margin: as for `project_`.
            ridge: as for `project_`.
            sample: which examples count; by default all.

        Returns:
            What `project_` returns, and per parameter whether any constraint depends on it; None where the model is no
            such chain, or not all tasks are to go through it at a time.

        Raises:
            RuntimeError: a row of G or a gradient has a NaN or an infinity. The gradients are then as they were.
            ValueError: the loss is not a scalar.
        """
        chain = self._engine.chain(constraints, parameters, sample=sample)
        if chain is None:
            return None
        weight = chain.weights[0]
        others = [parameter for parameter in parameters if parameter is not weight]
        G = self._rows(others, weight, len(constraints))
        delta = chain.backward(self._blocks(G, others))
        if len(others) == len(parameters):  # the first weight is frozen
            projection = project_(grads, G, margin, ridge)
        else:
            mine = next(grad for p, grad in zip(parameters, grads, strict=True) if p is weight)
            rest = [grad for p, grad in zip(parameters, grads, strict=True) if p is not weight]
            with torch.no_grad():
                projection = Projection(
                    *torch.ops.gem_fast._project_layer_(
                        rest or [G[0]], G, mine, delta, *chain.input, chain.sizes, margin, ridge
                    )
                )
        return projection, chain.reached(parameters)

    def _rows(self, parameters: Sequence[Tensor], weight: Tensor, t: int) -> Tensor:
        if not parameters:
            return weight.new_empty(t, 0)
        self._G = enough_rows(self._G, t, parameters)
        return self._G[:t]
