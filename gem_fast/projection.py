"""The projection of GEM (paper, Section 3): the closest gradient to g that raises no past task's loss.

P  = G G^T                                                        Gramian             gem_fast.ops.gram
q  = G g                       q_k < 0: task k's loss would rise  (Eq. 7)             gem_fast.ops.gram
v* = argmin_v 1/2 v'P v + q'v  subject to v >= margin             (Eq. 11)            gem_fast.ops.nnqp
g~ = g + G^T v*                written where the optimizer reads  (Eq. 8)             gem_fast.ops.combine_

Where G is a matrix, `project_` is one operator that does each of these only where it is needed: with no q_k < 0 the
gradient stays as it is, and where v = margin for every task already satisfies all constraints, P is never formed.

P and q come from float32 products where those are enough, else from float64 ones (docs/robustness.md, "Digits").
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gem_fast.gradients.interface import TaskGradients
from gem_fast.gradients.rows import RowGradients
from gem_fast.ops import Status, check_matrix, check_tensors


class Projection(NamedTuple):
    """What `project_` did; reading a value from a GPU synchronises, so that is left to the user."""

    v: Tensor
    """(t,) float64: the multipliers; all zero when no constraint was violated."""
    q: Tensor
    """(t,) float64: G g for the gradient that came in; q_k < 0 is a violated constraint."""
    status: Tensor
    """() int32: a `gem_fast.Status`."""
    residual: Tensor
    """() float64: g_k . g~ >= -residual |g_k| max(|g|, |g_m|) for every task k, with g_m = g + margin G^T 1.

    This bound covers the rounding of P and q, and is about 1e-6 where they come from float32 products, and 1e-15 where
    they come from float64 ones; it does not cover the rounding of g~ to the dtype of `grads`. 0 where P was not formed.
    """

    @property
    def multipliers(self) -> Tensor:
        """(t,) float64: v by its name; how much of each past task's gradient was added."""
        return self.v

    @property
    def violations(self) -> Tensor:
        """(t,) bool: the constraints that the incoming gradient violated (Eq. 7)."""
        return self.q < 0


def project_(grads: Sequence[Tensor], G: Tensor | TaskGradients, margin: float = 0.5, ridge: float = 0.0) -> Projection:
    """Projects the gradient onto the cone where no past task's loss rises (Eq. 8 and 11), in place.

    Whatever the status, |g~| <= |g + margin G^T 1| up to rounding, so with a margin of 0 the gradient never grows. With
    `Status.INACCURATE` some past task's loss may rise: v lies between the margin and what the constraints ask for.

    Args:
        grads: the parameters' gradients: tensors of G's dtype and device with p elements in total, any shapes and
            strides.
        G: the past tasks' gradients: a matrix (t, p), float32, float64, bfloat16 or float16, whose row k is the
            gradient of past task k's memory loss, flattened in the order of `grads` (it may be a slice of a larger
            buffer); or a `TaskGradients`, as an engine returns it.
        margin: lower bound on every v_k when a constraint is violated; the published experiments use 0.5
            (`memory_strength` in other implementations), and 0 is the plain projection. More margin favours past tasks.
        ridge: added to the diagonal of P; 0 is the exact projection, the published code uses 1e-3 (its `eps`).

    Returns:
        v, q, status and residual; see `Projection`.

    Raises:
        TypeError: an argument is not a dense tensor, or not a list of them.
        ValueError: shapes, dtypes or devices do not fit, or margin or ridge is negative or not finite.
        RuntimeError: G or a gradient has a NaN or an infinity (on the CPU; elsewhere status is `Status.NON_FINITE`).
            The gradients are then as they were.
    """
    if isinstance(G, RowGradients):
        G = G.G
    if isinstance(G, Tensor):
        check_matrix("G", G)
        check_tensors("grads", grads, like=G)
        return Projection(*torch.ops.gem_fast.project_(list(grads), G, float(margin), float(ridge)))
    by_itself = getattr(G, "project_", None)
    if by_itself:
        check_tensors("grads", grads, like=grads[0])
        return Projection(*by_itself(grads, float(margin), float(ridge)))
    if not (hasattr(G, "gram") and hasattr(G, "combine_")):
        raise TypeError(f"G must be a tensor or a TaskGradients, got {type(G).__name__}")
    for name, value in (("margin", margin), ("ridge", ridge)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    is_float64 = grads[0].dtype == torch.float64
    in_float64 = None if is_float64 else getattr(G, "in_float64", None)
    if in_float64 and grads[0].device.type != "cpu":
        # To find out whether float32 is enough would be to wait for the device.
        projection = _solve(grads, in_float64(), margin, ridge, in_float64=True)
        G.combine_(grads, projection.v)
        return projection
    form: TaskGradients = G
    projection = _solve(grads, form, margin, ridge, is_float64)
    if in_float64 and projection.status == Status.INACCURATE:
        form = in_float64()
        projection = _solve(grads, form, margin, ridge, in_float64=True)
    form.combine_(grads, projection.v)
    return projection


def _solve(grads: Sequence[Tensor], G: TaskGradients, margin: float, ridge: float, in_float64: bool) -> Projection:
    P, q = G.gram(grads)
    squared_length = getattr(G, "squared_length", None)
    if squared_length:
        g_squared = squared_length(grads)
    else:
        lengths = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
        g_squared = torch.stack(lengths).double().square().sum()
    cancellation = getattr(G, "cancellation", lambda P: None)(P)
    v, status, residual = torch.ops.gem_fast._project_dual(
        P, q, g_squared, cancellation, float(margin), float(ridge), in_float64
    )
    return Projection(v, q, status, residual)
