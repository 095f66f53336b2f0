"""TorchJD's UPGrad and DualProj with their quadratic programs solved in one call, on the device of the Gramian.

```diff
-from torchjd.aggregation import UPGrad
+from gem_fast.integrations.torchjd import UPGrad
```
"""

import logging

import torch
from torch import Tensor

from gem_fast import ops, solver
from gem_fast.integrations import framework

with framework("torchjd"):
    from torchjd import aggregation
    from torchjd.linalg import DualConeProjector

_log = logging.getLogger("gem_fast")

__all__ = ["DualProj", "DualProjWeighting", "NnqpProjector", "UPGrad", "UPGradWeighting"]


class NnqpProjector(DualConeProjector):
    """Projects onto the dual cone of the rows of a matrix with gem_fast's solver, as `QuadprogProjector` does.

    The weights w of the projection of J^T u, with the Gramian P = J J^T, minimise w' P w subject to w >= u. With
    v = w - u that is the problem of `nnqp` with q = P u, and all u are solved in one call.

    Args:
        norm_eps: where the trace of the Gramian is not above it, the Gramian counts as zero and w = u; otherwise the
            Gramian is divided by its trace. 1e-4 as in TorchJD; 0 projects however small the gradients are.
        reg_eps: added to the diagonal after that. 1e-4 as in TorchJD; the solver needs none, and 0 is the exact
            projection.

    Raises:
        ValueError: norm_eps or reg_eps is negative or not finite, here or when it is set later.
    """

    def __init__(self, *, norm_eps: float = 1e-4, reg_eps: float = 1e-4) -> None:
        self.norm_eps = norm_eps
        self.reg_eps = reg_eps
        self._said_inaccurate = False

    def __setattr__(self, name: str, value: float) -> None:
        if name in ("norm_eps", "reg_eps") and not 0.0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {value}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(norm_eps={self.norm_eps}, reg_eps={self.reg_eps})"

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        """The weights of the projections of the vectors J^T u.

        Args:
            U: (..., m) the u, of G's dtype and device.
            G: (m, m) the Gramian, of any floating-point dtype.

        Returns:
            (..., m) the w, of G's dtype.

        Raises:
            RuntimeError: G or U has a NaN or an infinity (on the CPU; elsewhere w is u).
        """
        if G.device.type != "cpu":
            return self._without_waiting(U, G)
        P, u = G.detach().double(), U.detach().double()
        trace = float(P.trace())
        if trace <= self.norm_eps:
            return U.detach().clone()
        ridge = self.reg_eps * trace if trace < float("inf") else 0.0  # as of P divided by its trace
        q = (u @ P).add_(u, alpha=ridge)
        v, status, _, _ = solver.nnqp(P.numpy(), q.numpy(), ridge=ridge)  # takes a quarter of what an operator does
        if any(status.flat):
            if (status == solver.Status.NON_FINITE).any():
                raise RuntimeError("G and U must be finite, got a NaN or an infinity")
            if not self._said_inaccurate:
                self._said_inaccurate = True
                _log.warning(
                    "the Gramian is not positive semidefinite by more than reg_eps = %g, so some projections are "
                    "inexact: give a larger reg_eps, or a Gramian of float64 gradients",
                    self.reg_eps,
                )
        return torch.from_numpy(v).add_(u).to(G.dtype)

    def _without_waiting(self, U: Tensor, G: Tensor) -> Tensor:
        P, u = G.detach().double(), U.detach().double()
        trace = P.trace()
        P = P * torch.where(trace > self.norm_eps, 1 / trace, 0.0)
        P.diagonal().add_(self.reg_eps)
        return (u + ops.nnqp(P, u @ P).v).to(G.dtype)


class _WithNnqp:
    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__(pref_vector, projector or NnqpProjector())  # type: ignore[call-arg]


class UPGradWeighting(_WithNnqp, aggregation.UPGradWeighting):
    """`torchjd.aggregation.UPGradWeighting`; its projector is `NnqpProjector()` where no other is given."""


class UPGrad(_WithNnqp, aggregation.UPGrad):
    """`torchjd.aggregation.UPGrad`; its projector is `NnqpProjector()` where no other is given."""


class DualProjWeighting(_WithNnqp, aggregation.DualProjWeighting):
    """`torchjd.aggregation.DualProjWeighting`; its projector is `NnqpProjector()` where no other is given."""


class DualProj(_WithNnqp, aggregation.DualProj):
    """`torchjd.aggregation.DualProj`; its projector is `NnqpProjector()` where no other is given."""
