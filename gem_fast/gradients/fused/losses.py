"""The sum of the tasks' mean losses: its gradient holds every task's own, because no example is in two tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gem_fast.gradients.fused.recorder import CannotFuse
from gem_fast.gradients.fused.task_batch import TaskBatch
from gem_fast.gradients.interface import Objective

# The class index that cross entropy leaves out of its mean.
_IGNORED = -100


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


def has_class_targets(batch: TaskBatch) -> bool:
    """Whether the gradient of the losses at outputs (N, classes) follows from these without computing the losses."""
    return batch.plain_cross_entropy and batch.y.dtype == torch.int64 and batch.y.dim() == 1


class LossRoot(NamedTuple):
    """Where the backward of a forward starts from."""

    output: Tensor
    """What the model returned."""
    start: Tensor
    """The sum of the tasks' losses; the output itself where the gradient there is known."""
    known: Tensor | None
    """The gradient at `start`; None where that is the loss."""

    @classmethod
    def of(cls, objective: Objective, output: Tensor, batch: TaskBatch) -> LossRoot:
        """The root of the losses at `output` (N, ...).

        Raises:
            CannotFuse: the outputs are not one per example.
            ValueError: the loss is not a scalar.
        """
        known = _known_gradient(output, batch)
        return cls(output, _sum_of_means(objective, output, batch) if known is None else output, known)

    def gradient(self) -> Tensor:
        """The gradient at the output."""
        if self.known is not None:
            return self.known
        [grad] = torch.autograd.grad(self.start, self.output)
        return grad


def _sum_of_means(objective: Objective, output: Tensor, batch: TaskBatch) -> Tensor:
    target, tasks = batch.y, batch.tasks
    if len(tasks) == 1:
        return objective.scalar_loss(output, target)
    if output.dim() == 0 or len(output) != tasks.total:
        raise CannotFuse(f"the model returns shape {tuple(output.shape)} for {tasks.total} examples")
    if batch.plain_cross_entropy and tasks.equal is not None:
        # Losses are per position (N, d1, ...): every task's mean is over the same number of them.
        positions = output.numel() // output.shape[1] // len(tasks)
        return F.cross_entropy(output, target, reduction="sum") / positions
    split = zip(tasks.split(output), tasks.split(target), strict=True)
    return torch.stack([objective.scalar_loss(mine, wanted) for mine, wanted in split]).sum()


def _known_gradient(output: Tensor, batch: TaskBatch) -> Tensor | None:
    known = (
        has_class_targets(batch)
        and output.dim() == 2
        and len(output) == batch.tasks.total
        and output.device.type == "cpu"
        and output.dtype in (torch.float32, torch.float64)
    )
    if not known:
        return None
    gradient: Tensor = torch.ops.gem_fast._cross_entropy_gradient(output.detach(), batch.y, batch.tasks.sizes)
    return gradient
