"""Embeddings: y = W[x]."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gem_fast.gradients.fused.recorder import CannotFuse, Recorder, TaskWriter
from gem_fast.gradients.fused.task_batch import TaskSizes


def embedding(recorder: Recorder, module: nn.Embedding, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """dL/dW[i] = sum of dL/dy over all places where the input is i."""
    for option in ("max_norm", "sparse", "scale_grad_by_freq"):
        if getattr(module, option):
            raise CannotFuse(f"Embedding has the option {option}")
    x, dim = recorder.per_example(module, input)
    output = forward(x)
    indices = x.transpose(0, dim)
    write = partial(_write_weight, module.padding_idx, indices)
    restrict = partial(_write_entries, module.padding_idx, indices)
    recorder.use(module.weight, output, dim, write, module=module, reads=input, restrict=restrict)
    return output


def _write_weight(padding_idx: int | None, x: Tensor, grad: Tensor, tasks: TaskSizes, out: Tensor) -> None:
    out.zero_()
    for index, mine, row in zip(tasks.split(x), tasks.split(grad), out, strict=True):
        row.index_add_(0, index.flatten(), mine.reshape(-1, mine.shape[-1]))
        if padding_idx is not None:
            row[padding_idx].zero_()


def _write_entries(padding_idx: int | None, x: Tensor, entries: slice) -> TaskWriter:
    """Writes some of the entries: the others, and the padding, are collected in one more, which is left out."""
    count = entries.stop - entries.start
    inside = (x >= entries.start) & (x < entries.stop)
    if padding_idx is not None:
        inside &= x != padding_idx
    local = torch.where(inside, x - entries.start, count)

    def write(grad: Tensor, tasks: TaskSizes, out: Tensor) -> None:
        for index, mine, row in zip(tasks.split(local), tasks.split(grad), out, strict=True):
            sums = row.new_zeros(count + 1, *row.shape[1:])
            row.copy_(sums.index_add_(0, index.flatten(), mine.reshape(-1, mine.shape[-1]))[:count])

    return write
