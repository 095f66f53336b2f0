"""The solver for NumPy arrays; it needs no torch and imports none."""

from enum import IntEnum
from typing import Any

from numpy.typing import ArrayLike, NDArray

try:
    from gem_fast import _solver
except ImportError as error:
    raise ImportError(
        f"gem_fast's compiled solver does not load: {error}; build it for this Python: "
        "pip install --force-reinstall --no-deps . in gem_fast's source folder"
    ) from error

__all__ = ["Status", "nnqp"]


class Status(IntEnum):
    """What a solve reports."""

    SOLVED = 0
    """The KKT conditions hold, to a residual of at most 1e-6: near 1e-15 in general, see csrc/core/tolerances.h."""
    INACCURATE = 1
    """They do not: P is not positive semidefinite, or the problem is unbounded below.

    Of a projection: float64 has too few digits for it. The gradient was moved as far as that is safe.
    """
    NON_FINITE = 2
    """The input has a NaN or an infinity; nothing was solved."""


def nnqp(
    P: ArrayLike, q: ArrayLike, lower: float = 0.0, ridge: float = 0.0
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """min over v of 1/2 v' (P + ridge I) v + q' v subject to v >= lower (paper, Eq. 11), batched, on this thread.

    The method is that of `gem_fast.ops.nnqp`, which takes tensors.

    Args:
        P: (t, t) or (..., t, t), symmetric positive semidefinite; one matrix serves every q. Converted to float64.
        q: (..., t), converted to float64.
        lower: bound on every v_k; the margin of GEM.
        ridge: added to the diagonal of P; 0 is the exact solution.

    Returns:
        v (..., t) float64: the minimiser.
        status (...,) int32: a `Status`; `Status.NON_FINITE` where P or q has a NaN or an infinity, and v is then zero.
        residual (...,) float64: the violation of the KKT conditions, relative to the problem's own scale.
        iterations (...,) int32: corrections of the set of constraints whose v is above the bound.

    Raises:
        TypeError: P or q cannot be converted to float64.
        ValueError: shapes do not fit, lower is not finite or ridge is negative.
    """
    return _solver.nnqp(P, q, lower, ridge)
