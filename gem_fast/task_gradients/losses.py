"""The sum of the tasks' mean losses: its gradient holds every task's own, because no example is in two tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gem_fast.task_gradients.pieces import Piece
from gem_fast.task_gradients.recording import CannotFuse

# The class index that cross entropy leaves out of its mean.
_IGNORED = -100


def check_scalar(loss: Tensor) -> Tensor:
    """Returns the loss; raises ValueError unless it is a scalar."""
    if loss.dim() != 0:
        raise ValueError(f"loss_fn must return a scalar, the mean over the examples, got shape {tuple(loss.shape)}")
    return loss


def is_plain_cross_entropy(loss_fn: Callable[[Tensor, Tensor], Tensor], target: Tensor) -> bool:
    """Whether the loss is a mean over the examples' cross entropies: the case that one vectorised call computes.

    Reads the targets: to be asked once for a memory, not in every step.
    """
    plain = loss_fn is F.cross_entropy or (
        type(loss_fn) is torch.nn.CrossEntropyLoss
        and loss_fn.weight is None
        and loss_fn.label_smoothing == 0.0
        and loss_fn.reduction == "mean"
        and loss_fn.ignore_index == _IGNORED
    )
    return plain and (target.is_floating_point() or not bool((target == _IGNORED).any()))


def sum_of_means(loss_fn: Callable[[Tensor, Tensor], Tensor], output: Tensor, piece: Piece) -> Tensor:
    """The sum over the piece's tasks of loss_fn's mean over the task's examples; output is (N, ...).

    Raises:
        CannotFuse: the outputs are not one per example.
        ValueError: the loss is not a scalar.
    """
    target, segments = piece.y, piece.segments
    if len(segments.sizes) == 1:
        return check_scalar(loss_fn(output, target))
    if output.dim() == 0 or len(output) != segments.total:
        raise CannotFuse(f"the model returns shape {tuple(output.shape)} for {segments.total} examples")
    if piece.vectorised and segments.equal is not None:
        # Losses are per position (N, d1, ...): every task's mean is over the same number of them.
        positions = output.numel() // output.shape[1] // len(segments.sizes)
        return F.cross_entropy(output, target, reduction="sum") / positions
    losses = [
        check_scalar(loss_fn(mine, wanted))
        for mine, wanted in zip(segments.split(output), segments.split(target), strict=True)
    ]
    return torch.stack(losses).sum()


class End(NamedTuple):
    """Where the backward of a piece starts from."""

    output: Tensor
    """What the model returned."""
    start: Tensor
    """The sum of the tasks' losses; the output itself where the gradient there is known."""
    known: Tensor | None
    """The gradient at `start`; None where that is the loss."""

    @classmethod
    def of(cls, loss_fn: Callable[[Tensor, Tensor], Tensor], output: Tensor, piece: Piece) -> End:
        """The end of a forward; see `sum_of_means`."""
        known = _known_gradient(output, piece)
        return cls(output, sum_of_means(loss_fn, output, piece) if known is None else output, known)

    def gradient(self) -> Tensor:
        """The gradient at the output."""
        if self.known is not None:
            return self.known
        [grad] = torch.autograd.grad(self.start, self.output)
        return grad


def has_known_gradient(piece: Piece) -> bool:
    """Whether the gradient of the losses at outputs (N, classes) follows from these without computing the losses."""
    return piece.vectorised and piece.y.dtype == torch.int64 and piece.y.dim() == 1


def _known_gradient(output: Tensor, piece: Piece) -> Tensor | None:
    known = (
        has_known_gradient(piece)
        and output.dim() == 2
        and len(output) == piece.segments.total
        and output.device.type == "cpu"
        and output.dtype in (torch.float32, torch.float64)
    )
    if not known:
        return None
    gradient: Tensor = torch.ops.gem_fast._cross_entropy_gradient(output.detach(), piece.y, piece.segments.sizes)
    return gradient
