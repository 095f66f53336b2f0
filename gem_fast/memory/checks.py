"""What a memory asks of the task and the sizes that it is given: each check raises with one sentence."""

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_classes(y: Any) -> None:
    """Raises unless y is a tensor (n,) with a class for each example."""
    if not isinstance(y, Tensor):
        got = "None" if y is None else type(y).__name__
        raise ValueError(f"y must be the examples' classes, integers of shape (n,), got {got}")
    if y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"y must be the examples' classes, integers of shape (n,), got {tuple(y.shape)}, {y.dtype}")


def plain_task(task: Hashable) -> Hashable:
    """The id, with NumPy's numbers and strings as Python's, which every state can hold; raises as `check_task`."""
    if type(task) is int or type(task) is str:  # most are: the quick way
        return task
    check_task(task)
    return _plain(task)


def _plain(task: Any) -> Hashable:
    if type(task) is tuple:
        return tuple(map(_plain, task))
    plain: Hashable = task.item() if isinstance(task, np.generic) else task
    return plain


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


def check_size(name: str, size: Any) -> None:
    """Raises unless a number of examples is a positive integer."""
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} must be an integer, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name} must be at least 1 example, got {size}")
