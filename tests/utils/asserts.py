"""What an answer must satisfy, and how close a result must be: shared by the tests."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def kkt_violation(P: Array, q: Array, v: Array, lower: float, ridge: float = 0.0) -> float:
    """The largest violation of the KKT conditions of the non-negative QP, relative to the problem's scale.

    v minimises 1/2 v' P v + q' v over v >= lower exactly when, with w = P v + q,
        w >= 0   (no past task's loss rises along g~: w_k = g_k . g~),   v >= lower,   (v - lower) w = 0,
    that is min(v_k - lower, w_k) = 0 for every k. Measured in units of gradient length, |g_k| = sqrt(P_kk), so that
    rows of any norm count alike; the scale is the largest |q_k| / |g_k| and |v_k| |g_k|.
    """
    P = P + ridge * np.eye(len(P))
    length = np.sqrt(np.diag(P))
    some = length > 0
    if not some.any():
        return 0.0
    w = (P @ v + q)[some] / length[some]
    u = (v - lower)[some] * length[some]
    scale = max(np.abs(q[some] / length[some]).max(), np.abs(v[some] * length[some]).max())
    return float(np.abs(np.minimum(u, w)).max() / scale) if scale > 0 else 0.0


def assert_as_accurate_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor, slack: float = 1e-7) -> None:
    """Our largest error is at most twice that of plain torch at the same dtype, both against float64."""
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    error = float((ours.double() - exact).abs().max()) if exact.numel() else 0.0
    reference = float((torchs.double() - exact).abs().max()) if exact.numel() else 0.0
    assert error <= 2 * reference + slack * scale, f"{error:.3e} against torch's {reference:.3e} at scale {scale:.3e}"


def assert_same_bits(x: Tensor, y: Tensor) -> None:
    """Equal shapes, dtypes and bytes: NaN equals NaN, and 0 does not equal -0."""
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert x.contiguous().view(torch.uint8).equal(y.contiguous().view(torch.uint8)) if x.dim() else x.equal(y)
