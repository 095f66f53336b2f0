"""Checks of the states that load_state_dict takes: they come from files, perhaps from a stranger.

Each raises ValueError with one sentence, before anything is changed.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor


def check_keys(name: str, state: Any, keys: tuple[str, ...]) -> None:
    """Raises unless `state` is a dictionary with exactly these keys."""
    if not isinstance(state, dict):
        raise ValueError(f"{name} must be a dictionary, got {type(state).__name__}")
    if set(state) != set(keys):
        got = ", ".join(sorted(map(str, state))) or "none"
        wanted = f"the keys {', '.join(keys)}" if keys else "no keys"
        raise ValueError(f"{name} must have {wanted}, got {got:.200}")


def check_count(name: str, value: Any, minimum: int, maximum: int) -> None:
    """Raises unless `value` is an integer in a range, both ends included."""
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be an integer between {minimum} and {maximum}, got {value!r:.50}")


def check_plain_tensor(name: str, value: Any) -> None:
    """Raises unless `value` is a dense tensor that is no meta, nested, quantized or expanded one."""
    dense = isinstance(value, Tensor) and value.layout is torch.strided
    if not dense or value.is_meta or value.is_nested or value.is_quantized:
        raise ValueError(f"{name} must be a dense tensor, got {type(value).__name__}")
    # A file of a few bytes can hold an expanded tensor of any size.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{name} must be a dense tensor, got an expanded one of shape {tuple(value.shape)}")


def check_generator(state: Any) -> None:
    """Raises unless `state` is one of a torch.Generator on the CPU."""
    try:
        torch.Generator().set_state(state)
    except (TypeError, RuntimeError) as error:
        raise ValueError("generator must be the state of a torch.Generator on the CPU, got another value") from error


def check_plain_task(name: str, task: Hashable, depth: int = 8) -> None:
    """Raises unless a task's id can be kept in a file that is read with weights_only=True.

    Args:
        name: what the id is called in the error.
        task: the id.
        depth: how deep tuples may be nested.

    Raises:
        ValueError: the id is not a number, a string, None or a tuple of these.
    """
    if isinstance(task, tuple) and depth:
        for part in task:
            check_plain_task(name, part, depth - 1)
    elif type(task) not in (int, float, str, bool, bytes, type(None)):
        raise ValueError(
            f"{name} must be a number, string, None or a tuple of these to be kept in a file, got {type(task).__name__}"
        )
