"""The stream `cifar100`: incremental CIFAR-100, where each task has a set of classes to itself."""

from __future__ import annotations

from typing import Literal

import torch

from gem_fast.paper.data import ImageData
from gem_fast.paper.data.cifar import IMAGE_SHAPE, N_CLASSES
from gem_fast.paper.errors import InputError
from gem_fast.paper.streams.classes import ClassStream, make_class_stream

__all__ = ["cifar100"]


def cifar100(
    data: ImageData,
    n_tasks: int = 20,
    samples_per_task: int | None = None,
    generator: torch.Generator | None = None,
    *,
    class_order: Literal["natural", "random"] = "natural",
) -> ClassStream:
    """T disjoint sets of the classes of CIFAR-100, with one slice of the outputs per task.

    Args:
        data: CIFAR-100, or a stand-in of its shape.
        n_tasks: The number of tasks T; 20 tasks have 5 classes and 2500 training examples each.
        samples_per_task: Training examples of each task, drawn without replacement; None takes all.
        generator: A CPU generator, source of the examples and of the order of classes; by default one with seed 0.
        class_order: "natural", as published: task 0 has the classes 0 ... 4, and so on; "random": drawn.

    Returns:
        The stream, on the CPU, with images of shape (3, 32, 32).

    Raises:
        InputError: The data are not like CIFAR-100; there are fewer classes than tasks or fewer examples than asked
            for, or no test examples of a task.
    """
    if data.train_images.shape[1:] != IMAGE_SHAPE or data.n_outputs > N_CLASSES:
        raise InputError(
            f"--data must be CIFAR-100 for the stream cifar100 (its name, folder or .tar.gz), got {data.name}"
        )
    generator = generator or torch.Generator().manual_seed(0)
    return make_class_stream(
        data, n_tasks, samples_per_task, generator, architecture="resnet18", class_order=class_order
    )
