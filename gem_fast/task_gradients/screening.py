"""q = G g without the largest part of G: most steps violate no constraint, and need not know more.

The current gradient of a first linear layer is D' X for the few inputs X of the mini-batch, so grad = A Q with
orthonormal rows Q that span those inputs. What a task's row of G has in common with it lies in that span, too, and is
found there: with Q x in the place of every input x of the memory, rows are as short as the mini-batch has examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from gem_fast.ops import gram
from gem_fast.task_gradients.chain import Link
from gem_fast.task_gradients.pieces import Segments
from gem_fast.task_gradients.protocol import Current

# What rounding makes of a gradient, in units of the last place.
_ROUNDING = 64


class Unexplained(Exception):
    """The current gradient is not what the current mini-batch alone makes of the first layer."""


def products(
    first: Link, delta: Tensor, segments: Segments, G: Tensor, parameters: Sequence[Parameter], current: Current
) -> Tensor | None:
    """q (t,) float64, where it takes less than G.

    Args:
        first: the first layer of a chain.
        delta: (N, units, and zeros up to whole cache lines): the gradient at its output.
        segments: which examples are whose.
        G: (t, p), but for the columns of the first layer's weight, which are not read.
        parameters: in the order in which they make up a row.
        current: the current mini-batch.

    Raises:
        Unexplained: the gradient is another one, as when it was accumulated over several mini-batches.
    """
    places = [i for i, parameter in enumerate(parameters) if parameter is first.weight]
    if not places:
        return None
    [at] = places
    grad, x = current.grads[at], current.x
    # Half the layer's units must be more than the mini-batch's examples, whole vectors of them.
    if x.dim() < 2 or x.dtype != grad.dtype or 2 * _whole(len(x)) > _whole(len(grad)):
        return None
    if x[0].numel() != grad.shape[1]:
        raise Unexplained
    A, Q, rest = torch.ops.gem_fast._span_factors(grad.contiguous(), x.flatten(1).contiguous())
    # Not "greater than": a NaN must not pass.
    if not rest <= _ROUNDING * torch.finfo(grad.dtype).eps:
        raise Unexplained
    inputs = first.x @ Q.T if first.entries is None else first.entries.linear(first.positions, Q, None)
    rows = grad.new_empty(len(G), *A.shape)
    torch.ops.gem_fast._linear_gradient_(rows, delta, inputs, segments.sizes)
    _, q = gram(rows.flatten(1), [A])
    start = sum(parameter.numel() for parameter in parameters[:at])
    for columns, some in (
        (slice(0, start), slice(0, at)),
        (slice(start + grad.numel(), None), slice(at + 1, None)),
    ):
        if parameters[some]:
            q += gram(G[:, columns], list(current.grads[some]))[1]
    return q


def _whole(n: int) -> int:
    return -(-n // 16) * 16
