"""Joint training: mini-batches of the examples of all tasks of a stream, shuffled together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gem_fast.paper.streams import Stream

__all__ = ["joint_batches"]


def joint_batches(
    stream: Stream, batches_per_epoch: int, epochs: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Mini-batches of the union of all tasks' training examples, in a new random order in every epoch.

    Args:
        stream: The tasks.
        batches_per_epoch: Mini-batches in an epoch; their sizes differ by 1 at most.
        epochs: Passes over all examples.
        generator: A CPU generator, source of the order.

    Yields:
        x, shape (batch, ...), y, shape (batch,), and each example's task, shape (batch,), int64, on the CPU.
    """
    counts = torch.tensor([len(task.labels) for task in stream.tasks])
    task_of = torch.arange(len(counts)).repeat_interleave(counts)
    for _ in range(epochs):
        # The tasks in a random order, and each task's own examples in a random order: a shuffled union.
        shuffled = task_of[torch.randperm(len(task_of), generator=generator)]
        examples = [stream.batches(task, 1, 1, generator) for task in range(len(counts))]
        for tasks in shuffled.tensor_split(batches_per_epoch):
            x, y = zip(*(next(examples[task]) for task in tasks.tolist()), strict=True)
            yield torch.cat(x), torch.cat(y), tasks
