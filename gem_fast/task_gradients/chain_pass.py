"""Passes through chains of linear layers, on a CPU: one backward of our own through all layers, task by task.

A model that is nothing but a chain goes forward here, too, and needs no autograd at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gem_fast.task_gradients.chain import Link
from gem_fast.task_gradients.pieces import Piece
from gem_fast.task_gradients.sparse import LayerInput

Blocks = dict[Tensor, Tensor]
"""For each parameter whose gradient is wanted the (t, ...) part of G's rows that is its own."""


class ChainPass(NamedTuple):
    """A pass through a chain, from which the gradients of all tasks are formed."""

    weights: list[Tensor]
    """Of the layers, first layer first."""
    biases: list[Tensor | None]
    input: LayerInput
    """The first layer's."""
    sizes: list[int]
    """The number of examples of each task."""
    run: Callable[[list[Tensor], list[Tensor], list[int]], Tensor]
    """Takes where the gradients go of all weights but the first, and of all biases, and the sizes; see `backward`."""

    @classmethod
    def recorded(cls, links: Sequence[Link], grad: Tensor, sizes: list[int]) -> ChainPass:
        """A pass of which the forward is done, and the gradient at the output (N, classes) known."""
        first, *others = links
        weights = [link.weight for link in links]
        run = partial(torch.ops.gem_fast._mlp_backward, grad, [link.x for link in others], weights)
        given = LayerInput.of(first.x, first.entries, first.positions)
        return cls(weights, [link.bias for link in links], given, sizes, run)

    @classmethod
    def through(cls, layers: Sequence[nn.Linear], piece: Piece) -> ChainPass:
        """A pass through a model that is these layers and nothing else, and the mean cross entropy of each task."""
        weights: list[Tensor] = [layer.weight for layer in layers]
        biases: list[Tensor | None] = [layer.bias for layer in layers]
        entries, positions, sizes = piece.entries, piece.positions, piece.segments.sizes
        x = piece.x.flatten(1).contiguous() if entries is None else None
        given = [] if entries is None else entries.row_pairs if positions is None else entries.by_rows
        run = partial(torch.ops.gem_fast._mlp_pass, x, given, positions, piece.y, weights, biases)
        return cls(weights, biases, LayerInput.of(x, entries, positions), sizes, run)

    @torch.no_grad()
    def backward(self, blocks: Blocks) -> Tensor:
        """Writes all blocks but the first weight's.

        Returns:
            (N, outputs), with zeros up to whole cache lines: the gradient at the first layer's output.
        """
        nothing = self.weights[0].new_empty(0)
        for parameter in blocks.keys() - {*self.weights, *self.biases}:
            blocks[parameter].zero_()
        return self.run(
            [blocks.get(weight, nothing) for weight in self.weights[1:]],
            [nothing if bias is None else blocks.get(bias, nothing) for bias in self.biases],
            self.sizes,
        )

    def write(self, blocks: Blocks) -> list[bool]:
        """Writes rows of G; returns, per parameter, whether any of these rows depends on it."""
        delta = self.backward(blocks)
        weight = self.weights[0]
        if weight in blocks:
            torch.ops.gem_fast._layer_gradient_(blocks[weight], delta, *self.input, self.sizes)
        return self.reached(blocks)

    def reached(self, parameters: Iterable[Tensor]) -> list[bool]:
        """For each of these parameters, whether it is one of the chain's."""
        own = {*self.weights, *self.biases}
        return [parameter in own for parameter in parameters]
