"""What a memory asks of the examples that it is given: each check raises with one sentence."""

from collections.abc import Hashable

import torch
from torch import Tensor


def check_examples(x: Tensor, y: Tensor) -> None:
    """Raises unless x and y are dense tensors with the same, positive number of examples."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got a sparse one of layout {value.layout}")
        if value.dim() == 0 or len(value) == 0:
            raise ValueError(f"{name} must hold at least one example, got shape {tuple(value.shape)}")
    if len(x) != len(y):
        raise ValueError(f"x and y must have the same number of examples, got {len(x)} and {len(y)}")


def check_classes(y: Tensor) -> None:
    """Raises unless y (n,) holds a class for each example."""
    if y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"y must be the examples' classes, integers of shape (n,), got {tuple(y.shape)}, {y.dtype}")


def check_task(task: Hashable) -> None:
    """Raises unless `task` can serve as an id. Tensors hash by identity: equal ones would be different tasks."""
    if task is None:
        raise TypeError("task must be a hashable id such as an int or a string, got None, which stands for no task")
    if isinstance(task, Tensor):
        raise TypeError("task must be a hashable id such as an int or a string, got a tensor; use task.item()")
    try:
        hash(task)
    except TypeError:
        raise TypeError(f"task must be a hashable id such as an int or a string, got {type(task).__name__}") from None


def check_size(name: str, size: int) -> None:
    """Raises unless a number of examples is a positive integer."""
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} must be an integer, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name} must be at least 1 example, got {size}")
