"""The method in plain NumPy: slow, short, and easy to check. Tests and benchmarks compare with it.

Needs quadprog: pip install 'gem_fast[reference]'.
"""

from collections.abc import Callable, Hashable, Sequence
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
        P: (t, t) float64, symmetric positive definite, else quadprog fails: the Gramian of dependent rows needs a
            ridge.
        q: (t,) float64.
        lower: lower bound on every v_k, 0 by default.
        ridge: added to the diagonal, 0 by default.

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


def project_columns_(grads: Sequence[Tensor], columns: Tensor, margin: float = 0.5, ridge: float = 1e-3) -> None:
    """The projection in place, as public versions do it: tensors are copied one by one, and NumPy solves in float64.

    Args:
        grads: the current gradient: float32 tensors with p elements in total.
        columns: (p, t + 1) float32: one past task's gradient per column; the last column is scratch.
        margin: lower bound on every v_k when a constraint is violated.
        ridge: added to the Gramian's diagonal; public versions use 1e-3, since quadprog needs it.

    Raises:
        ModuleNotFoundError: quadprog is not installed.
        ValueError: quadprog's own, see `nnqp`.
    """
    copy_gradient_(columns, -1, grads)
    past, current = columns[:, :-1], columns[:, -1]
    if not bool((current.unsqueeze(0) @ past < 0).any()):
        return
    projected, _ = project(current.cpu().contiguous().double().numpy(), past.cpu().t().double().numpy(), margin, ridge)
    parts = torch.from_numpy(projected).split([grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))


def copy_gradient_(columns: Tensor, k: int, grads: Sequence[Tensor]) -> None:
    """Writes a gradient, tensor by tensor, into column k of a (p, t) matrix."""
    start = 0
    for grad in grads:
        columns[start : start + grad.numel(), k].copy_(grad.reshape(-1))
        start += grad.numel()


class PurePythonGEM:
    """A GEM learner as public versions write it: the baseline of the benchmarks.

    One backward per past task into `.grad`, each copied into a column of a (p, t + 1) matrix, tensor by tensor; the
    projection is `project_columns_`.

    Args:
        model: every parameter gets a gradient from every example.
        optimizer: a torch optimizer over the model's parameters.
        memory: the examples of past tasks.
        loss_fn: loss_fn(output, target) -> scalar, the mean over the examples.
        forward: forward(x, task) -> output; model(x) by default.
        margin: lower bound on every v_k when a constraint is violated.
        ridge: added to the Gramian's diagonal.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        memory: Memory,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        forward: Callable[[Tensor, Any], Tensor] | None = None,
        margin: float = 0.5,
        ridge: float = 1e-3,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.memory = memory
        self.loss_fn = loss_fn
        self.forward = forward or (lambda x, task: model(x))
        self.margin = margin
        self.ridge = ridge

    def observe(self, x: Tensor, y: Tensor, task: Hashable) -> None:
        """Trains on one mini-batch: x (n, ...), y (n, ...) of `task`."""
        self.memory.observe(x, y, task)
        past = [other for other in self.memory.tasks if other != task]
        columns = torch.zeros(sum(p.numel() for p in self.model.parameters()), len(past) + 1, device=x.device)
        for k, other in enumerate(past):
            copy_gradient_(columns, k, self._gradient(*self.memory.examples(other), other))
        grads = self._gradient(x, y, task)
        if past:
            project_columns_(grads, columns, self.margin, self.ridge)
        self.optimizer.step()

    def _gradient(self, x: Tensor, y: Tensor, task: Hashable) -> list[Tensor]:
        self.model.zero_grad()
        self.loss_fn(self.forward(x, task), y).backward()
        return [p.grad for p in self.model.parameters() if p.grad is not None]


def _quadprog() -> Any:
    try:
        import quadprog
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "gem_fast.reference needs quadprog, which is not installed: pip install 'gem_fast[reference]'"
        ) from None
    return quadprog
