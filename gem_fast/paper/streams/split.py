"""The stream `split`: the classes of any data set of grey images, dealt out to the tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from gem_fast.paper.data import ImageData, check_grey
from gem_fast.paper.streams.classes import ClassStream, make_class_stream

__all__ = ["split"]


def split(
    data: ImageData,
    n_tasks: int = 5,
    samples_per_task: int | None = None,
    generator: torch.Generator | None = None,
    *,
    class_order: Literal["natural", "random"] = "natural",
    head: Literal["task", "shared"] = "task",
) -> ClassStream:
    """T disjoint sets of the classes of a data set of grey images.

    Args:
        data: The data set.
        n_tasks: The number of tasks T; 5 tasks of ten digits have 2 each.
        samples_per_task: Training examples of each task, drawn without replacement; None takes all.
        generator: A CPU generator, source of the examples and of the order of classes; by default one with seed 0.
        class_order: "natural": task 0 has the first classes, and so on; "random": drawn.
        head: "task": one slice of the outputs per task, so that the task's number helps to answer; "shared": every task
            is answered with all outputs, without its number (class-incremental learning).

    Returns:
        The stream, on the CPU, with images of shape (pixels,).

    Raises:
        InputError: The images are in colour; there are fewer classes than tasks or fewer examples than asked for, or no
            test examples of a task.
    """
    check_grey(data, "split")
    flat = replace(data, train_images=data.train_images.flatten(1), test_images=data.test_images.flatten(1))
    generator = generator or torch.Generator().manual_seed(0)
    return make_class_stream(
        flat, n_tasks, samples_per_task, generator, architecture="mlp", class_order=class_order, head=head
    )
