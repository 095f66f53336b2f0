"""One projection per step: of the gradient that the step reads, which its closure computes where it has one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Project = Callable[[Optimizer], None]


class OneProjection:
    """Runs the projection once in each step of an optimizer, from its step hooks.

    A subclass whose step calls that of its base class has the hooks run in both. The second of them is told from a new
    step by this: the first has not ended, no batch was observed since (the first may have failed), and the gradients
    are the same tensors.
    """

    def __init__(self) -> None:
        self._projected: list[Tensor | None] | None = None

    def before_step(
        self, project: Project, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Projects, or gives back the step's arguments with a closure that runs the user's and then projects.

        Args:
            project: the projection of the optimizer's gradients.
            optimizer: about to step.
            args: the positional arguments of step, the optimizer first.
            kwargs: its keyword arguments.
        """
        closure = kwargs.get("closure") or next((arg for arg in args[1:2] if callable(arg)), None)
        if isinstance(closure, _Closure):
            return None
        if closure is None:
            self._project_once(project, optimizer)
            return None
        closure = _Closure(closure, lambda: self._project_once(project, optimizer), type(optimizer).__name__)
        if kwargs.get("closure") is None:
            return (args[0], closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure}

    def new_step(self) -> None:
        """What comes next is a new step: one has ended, or a batch was observed."""
        self._projected = None

    def _project_once(self, project: Project, optimizer: Optimizer) -> None:
        if self._projected is None or not _same(self._projected, _gradients(optimizer)):
            project(optimizer)
            self._projected = _gradients(optimizer)


class _Closure:
    def __init__(self, closure: Callable[[], Any], project: Callable[[], None], name: str) -> None:
        self._closure = closure
        self._project = project
        self._name = name
        self._is_called = False

    def __call__(self) -> Any:
        if self._is_called:
            raise RuntimeError(
                "optimizer.step must call its closure once when GEM is attached, got a second call from " + self._name
            )
        self._is_called = True
        with torch.enable_grad():
            loss = self._closure()
        self._project()
        return loss


def _gradients(optimizer: Optimizer) -> list[Tensor | None]:
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def _same(before: list[Tensor | None], now: list[Tensor | None]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))
