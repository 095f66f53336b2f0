"""One forward and one backward per past task: the reference that every other engine must agree with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.ops import pack_
from gem_fast.task_gradients.losses import check_scalar
from gem_fast.task_gradients.protocol import Batch, Sample, TaskRows, chosen
from gem_fast.task_gradients.rows import new_rows, random_devices


class LoopTaskGradients:
    """Computes the rows of G one after the other, with torch.autograd.

    A model in training mode sees each task's memory on its own, in order: batch normalisation normalises and updates
    its running statistics as if each memory were a mini-batch.

    Args:
        model: called as model(x), or model(x, task) with `pass_task`.
        loss_fn: loss_fn(output, target) -> scalar, the mean over the examples.
        pass_task: whether the model takes the task as its second argument.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], *, pass_task: bool = False
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._pass_task = pass_task

    def __call__(
        self,
        constraints: Sequence[Sequence[Batch]],
        parameters: Sequence[Parameter],
        *,
        out: Tensor | None = None,
        rows: slice | None = None,
        sample: Sample | None = None,
    ) -> TaskRows:
        """Row k is the gradient of the mean loss over all examples of constraint k's batches (Eq. 5).

        Raises:
            ValueError: the loss is not a scalar.
        """
        sizes = [parameter.numel() for parameter in parameters]
        G = new_rows(len(constraints), parameters) if out is None else out
        reached = [False] * len(parameters)
        with torch.random.fork_rng(random_devices(parameters)), torch.enable_grad():
            computed = slice(None) if rows is None else rows
            for row, batches in zip(G[computed], chosen(constraints, sample)[computed], strict=True):
                loss = self._mean_loss(batches)
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
                pack_(row, grads, sizes)
                reached = [was or grad is not None for was, grad in zip(reached, grads, strict=True)]
        return TaskRows(G, reached)

    def _mean_loss(self, batches: Sequence[Batch]) -> Tensor:
        if len(batches) == 1:
            return self._loss(batches[0])
        examples = sum(len(batch.x) for batch in batches)
        return torch.stack([self._loss(batch) * (len(batch.x) / examples) for batch in batches]).sum()

    def _loss(self, batch: Batch) -> Tensor:
        output = self._model(batch.x, batch.task) if self._pass_task else self._model(batch.x)
        return check_scalar(self._loss_fn(output, batch.y))
