"""The method in plain NumPy: slow, short, and obviously right. Tests compare with it, benchmarks start from it.

Needs quadprog: pip install 'gem_fast[reference]'.
"""

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from gem_fast.memory import Memory

Array = NDArray[np.float64]


def nnqp(P: Array, q: Array, lower: float = 0.0, ridge: float = 0.0) -> Array:
    """argmin over v of 1/2 v' (P + ridge I) v + q' v subject to v >= lower (Eq. 11), by quadprog.

    Args:
        P: (t, t) float64, symmetric positive definite: quadprog refuses less, so a Gramian of dependent rows needs a
            ridge.
        q: (t,) float64.
        lower: bound on every v_k.
        ridge: added to the diagonal.

    Returns:
        v (t,) float64.

    Raises:
        ModuleNotFoundError: quadprog is not installed.
        ValueError: quadprog's own, "matrix G is not positive definite".
    """
    t = len(q)
    solution: Array = _quadprog().solve_qp(P + ridge * np.eye(t), -q, np.eye(t), np.full(t, lower))[0]
    return solution


def project(g: Array, G: Array, margin: float = 0.5, ridge: float = 0.0) -> tuple[Array, Array]:
    """The projection of Eq. 8 and 11.

    Args:
        g: (p,) float64, the current gradient.
        G: (t, p) float64, the past tasks' gradients.
        margin: lower bound on every v_k when a constraint is violated.
        ridge: added to the Gramian's diagonal.

    Returns:
        g~ (p,) and v (t,); v = 0 and g~ = g when no constraint is violated.

    Raises:
        ModuleNotFoundError: quadprog is not installed.
        ValueError: quadprog's own, see `nnqp`.
    """
    q = G @ g
    if (q >= 0).all():
        return g, np.zeros(len(G))
    v = nnqp(G @ G.T, q, margin, ridge)
    return g + G.T @ v, v


class PurePythonGEM:
    """A GEM learner's step as public versions do it: the baseline of the benchmarks.

    One backward per past task into `.grad`, each copied into a column of a (p, t) matrix, parameter by parameter; where
    a constraint is violated, that matrix goes to float64 NumPy and quadprog, and the result is copied back.

    Args:
        model: called as model(x).
        optimizer: a torch optimizer over the model's parameters.
        memory: the examples of past tasks.
        loss_fn: loss_fn(output, target) -> scalar, the mean over the examples.
        margin: lower bound on every v_k when a constraint is violated.
        ridge: added to the Gramian's diagonal; public versions use 1e-3, since quadprog needs it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        memory: Memory,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        margin: float = 0.5,
        ridge: float = 1e-3,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.memory = memory
        self.loss_fn = loss_fn
        self.margin = margin
        self.ridge = ridge

    def observe(self, x: Tensor, y: Tensor, task: Hashable) -> None:
        """Trains on one mini-batch: x (n, ...), y (n, ...) of `task`."""
        self.memory.observe(x, y, task)
        past = [other for other in self.memory.tasks if other != task]
        columns = torch.zeros(sum(p.numel() for p in self.model.parameters()), len(past) + 1)
        for k, other in enumerate(past):
            self._backward(*self.memory.examples(other))
            self._copy_gradient(columns, k)
        self._backward(x, y)
        if past:
            self._copy_gradient(columns, len(past))
            current = columns[:, -1]
            if bool((torch.mm(current.unsqueeze(0), columns[:, :-1]) < 0).any()):
                G = columns[:, :-1].t().double().numpy()
                g = current.contiguous().double().numpy()
                projected, _ = project(g, G, self.margin, self.ridge)
                self._write_gradient(torch.from_numpy(projected))
        self.optimizer.step()

    def _backward(self, x: Tensor, y: Tensor) -> None:
        self.model.zero_grad()
        self.loss_fn(self.model(x), y).backward()

    def _copy_gradient(self, columns: Tensor, k: int) -> None:
        start = 0
        for p in self.model.parameters():
            if p.grad is not None:
                columns[start : start + p.numel(), k].copy_(p.grad.view(-1))
            start += p.numel()

    def _write_gradient(self, flat: Tensor) -> None:
        start = 0
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()


def _quadprog() -> Any:
    try:
        import quadprog
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "gem_fast.reference needs quadprog, which is not installed: pip install 'gem_fast[reference]'"
        ) from None
    return quadprog
