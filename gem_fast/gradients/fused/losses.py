"""The sum of the tasks' mean losses: its gradient holds every task's own, because no example is in two tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gem_fast.batches import split
from gem_fast.containers import map_tensors
from gem_fast.gradients.fused.recorder import CannotFuse
from gem_fast.gradients.fused.task_batch import TaskBatch
from gem_fast.gradients.interface import Objective

# The class index that cross entropy leaves out of its mean.
_IGNORED = -100


def is_plain_cross_entropy(loss_fn: Callable[[Any, Any], Tensor], target: Any) -> bool:
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
    if not plain or not isinstance(target, Tensor):
        return False
    # No class is negative, so the smallest target tells.
    return target.is_floating_point() or int(target.amin()) != _IGNORED


def has_class_targets(batch: TaskBatch) -> bool:
    """Whether the gradient of the losses at outputs (N, classes) follows from these without computing the losses."""
    return batch.plain_cross_entropy and batch.targets.dtype == torch.int64 and batch.targets.dim() == 1


class LossRoot(NamedTuple):
    """Where the backward of a forward starts from."""

    output: Any
    """What the model returned: a tensor, or a nest of tensors and other values."""
    start: Tensor
    """The sum of the tasks' losses; the output itself where the gradient there is known."""
    known: Tensor | None
    """The gradient at `start`; None where that is the loss."""
    shared: Sequence[Tensor] = ()
    """Leaves in the place of outputs that are not one per example: a loss that relies on them is not one task's own."""
    current: Tensor | None = None
    """The loss of the current mini-batch, where that is the batch's last task."""

    @classmethod
    def of(cls, objective: Objective, output: Any, batch: TaskBatch) -> LossRoot:
        """The root of the losses at `output`: (N, ...), or a nest with tensors (N, ...) in it.

        Raises:
            CannotFuse: the outputs are not one per example.
            ValueError: the loss is not a scalar.
        """
        known = _known_gradient(output, batch)
        if known is not None:
            return cls(output, output, known)
        shared: list[Tensor] = []
        if len(batch.tasks) > 1 and not isinstance(output, Tensor):
            output = map_tensors(lambda x: _without_shared(x, batch.tasks.total, shared), output)
        if batch.past is None:
            return cls(output, _sum_of_means(objective, output, batch), None, shared)
        (of_past, mine), (_, wanted) = _past_and_current(output, batch), _past_and_current(batch.y, batch)
        current = objective.scalar_loss(mine, wanted)
        return cls(output, current + _sum_of_means(objective, of_past, batch.past), None, shared, current.detach())

    def gradient(self) -> Tensor:
        """The gradient at the output."""
        if self.known is not None:
            return self.known
        grad: Tensor
        [grad] = torch.autograd.grad(self.start, self.output)
        return grad


def _past_and_current(value: Any, batch: TaskBatch) -> list[Any]:
    n = batch.tasks.sizes[-1]
    parts = split(value, [batch.tasks.total - n, n]) if value is not None else [None, None]
    if parts is None:
        raise _not_per_example(value, batch)
    return parts


def _not_per_example(output: Any, batch: TaskBatch) -> CannotFuse:
    got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    return CannotFuse(f"the model returns {got} for {batch.tasks.total} examples")


def _sum_of_means(objective: Objective, output: Any, batch: TaskBatch) -> Tensor:
    target, tasks = batch.y, batch.tasks
    if len(tasks) == 1:
        return objective.scalar_loss(output, target)
    outputs = split(output, tasks.sizes)
    if outputs is None:
        raise _not_per_example(output, batch)
    if batch.plain_cross_entropy and tasks.equal is not None and isinstance(output, Tensor):
        # Losses are per position (N, d1, ...): every task's mean is over the same number of them.
        positions = output.numel() // output.shape[1] // len(tasks)
        return F.cross_entropy(output, target, reduction="sum") / positions
    targets = split(target, tasks.sizes) or [None] * len(tasks)
    losses = [objective.scalar_loss(mine, wanted) for mine, wanted in zip(outputs, targets, strict=True)]
    return torch.stack(losses).sum()


def _without_shared(x: Any, n: int, shared: list[Tensor]) -> Any:
    """x, or where it is not one per example and has a history, a leaf in its place, added to `shared`."""
    if not isinstance(x, Tensor) or not x.requires_grad or (x.dim() > 0 and len(x) == n):
        return x
    shared.append(x.detach().requires_grad_())
    return shared[-1]


def _known_gradient(output: Any, batch: TaskBatch) -> Tensor | None:
    known = (
        has_class_targets(batch)
        and isinstance(output, Tensor)
        and output.dim() == 2
        and len(output) == batch.tasks.total
        and output.device.type == "cpu"
        and output.dtype in (torch.float32, torch.float64)
    )
    if not known:
        return None
    gradient: Tensor = torch.ops.gem_fast._cross_entropy_gradient(output.detach(), batch.y, batch.tasks.sizes)
    return gradient
