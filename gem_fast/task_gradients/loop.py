"""One forward and one backward per past task: the reference that every other engine must agree with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.ops import pack_
from gem_fast.task_gradients.protocol import Batch, TaskRows

# Rows of G start on cache lines, which makes the Gramian's loads aligned.
_ALIGNMENT_BYTES = 64


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
        self._buffer: Tensor | None = None

    def __call__(self, constraints: Sequence[Sequence[Batch]], parameters: Sequence[Parameter]) -> TaskRows:
        """Row k is the gradient of the mean loss over all examples of constraint k's batches (Eq. 5).

        Raises:
            ValueError: the loss is not a scalar.
        """
        sizes = [parameter.numel() for parameter in parameters]
        G = self._rows(len(constraints), sum(sizes), parameters[0])
        reached = [False] * len(parameters)
        with torch.random.fork_rng(_random_devices(parameters)), torch.enable_grad():
            for row, batches in zip(G, constraints, strict=True):
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
        loss = self._loss_fn(output, batch.y)
        if loss.dim() != 0:
            raise ValueError(f"loss_fn must return a scalar, the mean over the examples, got shape {tuple(loss.shape)}")
        return loss

    def _rows(self, t: int, p: int, like: Tensor) -> Tensor:
        per_line = _ALIGNMENT_BYTES // like.element_size()
        width = -(-p // per_line) * per_line
        kept = self._buffer
        if (
            kept is None
            or kept.shape[0] < t
            or kept.shape[1] != width
            or kept.dtype != like.dtype
            or kept.device != like.device
        ):
            self._buffer = kept = torch.empty((t, width), dtype=like.dtype, device=like.device)
        return kept[:t, :p]


def _random_devices(parameters: Sequence[Parameter]) -> list[int]:
    """The GPUs whose random numbers the pass may use up; none while a graph is captured, which brings its own."""
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    return [] if devices and torch.cuda.is_current_stream_capturing() else devices
