"""The stages of the projection as torch operators, one function per stage.

    memory -> task_gradients -> G -> gram -> nnqp -> combine_ -> p.grad -> optimizer.step()

Symbols are the paper's (Section 3): row k of G, shape (t, p), is the gradient g_k of past task k's memory loss; g,
shape (p,), is the gradient of the current mini-batch, given as the list of the parameters' `.grad` tensors.

All operators work under `torch.compile(fullgraph=True)`. They are deterministic: the same input gives the same bits,
whatever the number of threads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gem_fast import _C, _fake  # noqa: F401 (_fake registers kernels for the operators of _C)
from gem_fast.solver import Status

__all__ = ["Nnqp", "Status", "combine_", "gram", "nnqp", "pack_"]

# A build without CUDA code knows no GPU.
_DEVICES = ("cpu", "cuda") if _C.build_info()["cuda_architectures"] else ("cpu",)


class Nnqp(NamedTuple):
    """The solution of `nnqp`."""

    v: Tensor
    """(..., t) float64: the minimiser."""
    status: Tensor
    """(...,) int32: a `Status`."""
    residual: Tensor
    """(...,) float64: the violation of the KKT conditions, relative to the problem's own scale."""


def gram(G: Tensor, grads: Sequence[Tensor], in_float64: bool = False) -> tuple[Tensor, Tensor]:
    """P = G G^T and q = G g (Eq. 11), in one read of G.

    Products are formed in float32 (float64 for float64 input) over short blocks, whose sums are added in float64.
    Their error is then at most 1e-6 |g_k| |g_j|; `project_` finds out where that is too much.

    Args:
        G: (t, p), float32, float64, bfloat16 or float16; one row per past task.
        grads: tensors of G's dtype and device that hold p elements in total, any shapes and strides; g is all of them,
            flattened and one after the other.
        in_float64: form the products in float64, whatever the dtype.

    Returns:
        P (t, t) and q (t,), float64. q_k < 0 means that a step along -g would raise the loss of task k (Eq. 7).

    Raises:
        TypeError: an argument is not a dense tensor, or not a list of them.
        ValueError: shapes, dtypes or devices do not fit.
        RuntimeError: G or g has a NaN or an infinity (on the CPU; elsewhere P and q carry it on).
    """
    check_matrix("G", G)
    check_tensors("grads", grads, like=G)
    P, q = torch.ops.gem_fast.gram(G, list(grads), in_float64)
    return P, q


def nnqp(P: Tensor, q: Tensor, lower: float = 0.0, ridge: float = 0.0) -> Nnqp:
    """min over v of 1/2 v' (P + ridge I) v + q' v subject to v >= lower (Eq. 11), batched.

    A dual active-set method with a Cholesky factor updated in place. It needs no ridge: duplicate rows, zero rows and
    any rank of P are solved as they stand, at any scale.

    Args:
        P: (t, t) or (..., t, t), float64, symmetric positive semidefinite; one matrix serves every q.
        q: (..., t), float64.
        lower: bound on every v_k; the margin of GEM.
        ridge: added to the diagonal of P; 0 is the exact projection.

    Returns:
        v (..., t) float64, status (...,) int32 and residual (...,) float64; see `Nnqp`.

    Raises:
        TypeError: an argument is not a dense tensor.
        ValueError: shapes, dtypes or devices do not fit, lower is not finite or ridge is negative.
        RuntimeError: P or q has a NaN or an infinity (on the CPU; elsewhere status is `Status.NON_FINITE`).
    """
    check_matrix("P", P)
    check_tensors("q", [q], like=P, like_name="P", name_items=False)
    return Nnqp(*torch.ops.gem_fast.nnqp(P, q, float(lower), float(ridge)))


def combine_(grads: Sequence[Tensor], G: Tensor, v: Tensor) -> None:
    """g <- g + G^T v (Eq. 8), written into `grads` in one pass; rows with v_k = 0 are skipped.

    Args:
        grads: as for `gram`; written in place, whatever their strides.
        G: as for `gram`.
        v: (t,) float64.

    Raises:
        TypeError: an argument is not a dense tensor, or not a list of them.
        ValueError: shapes, dtypes or devices do not fit, or a tensor of `grads` is an expanded one.
        RuntimeError: v has a NaN or an infinity (on the CPU, where `grads` is then as it was).
    """
    check_matrix("G", G)
    check_tensors("grads", grads, like=G)
    check_tensors("v", [v], like=G, name_items=False)
    torch.ops.gem_fast.combine_(list(grads), G, v)


def pack_(row: Tensor, tensors: Sequence[Tensor | None], sizes: Sequence[int] | None = None) -> None:
    """Writes a list of tensors, flattened and one after the other, into one row of G.

    Args:
        row: (p,), contiguous; float32, float64, bfloat16 or float16.
        tensors: tensors of row's dtype and device with p elements in total; None stands for zeros.
        sizes: number of elements of each tensor; needed where one of them is None.

    Raises:
        TypeError: an argument is not a dense tensor, or not a list of them.
        ValueError: shapes, dtypes or devices do not fit, or a tensor is None and `sizes` is not given.
    """
    check_matrix("row", row)
    check_tensors("tensors", [x for x in tensors if x is not None], like=row, like_name="row")
    if sizes is None:
        if any(x is None for x in tensors):
            raise ValueError("sizes must be given where a tensor of tensors is None, got None")
        sizes = [x.numel() for x in tensors if x is not None]
    elif not all(isinstance(n, int) for n in sizes):
        raise TypeError(f"sizes must be a list of integers, got {sizes!r:.100}")
    torch.ops.gem_fast.pack_(row, list(tensors), list(sizes))


def check_matrix(name: str, x: Tensor) -> None:
    """Raises unless x is a dense tensor on a device that this build has kernels for."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got a sparse one of layout {x.layout}")
    if x.device.type not in _DEVICES:
        hint = "" if "cuda" in _DEVICES else "; to build with CUDA, install nvcc and build with GEM_FAST_CUDA=1"
        raise ValueError(
            f"{name} must be on a device that this build supports ({', '.join(_DEVICES)}), got {x.device}{hint}"
        )


def check_tensors(
    name: str, tensors: Sequence[Tensor], like: Tensor, like_name: str = "G", name_items: bool = True
) -> None:
    """Raises unless every item is a dense tensor on the device of `like`; the operators check sizes and dtypes."""
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
    for i, x in enumerate(tensors):
        if isinstance(x, Tensor) and x.layout is torch.strided and x.device == like.device:
            continue
        item = f"{name}[{i}]" if name_items else name
        if not isinstance(x, Tensor):
            raise TypeError(f"{item} must be a tensor, got {type(x).__name__}")
        if x.layout is not torch.strided:
            raise TypeError(f"{item} must be a dense tensor, got a sparse one of layout {x.layout}")
        raise ValueError(f"{item} must be on {like_name}'s device {like.device}, got {x.device}")


def build_info() -> dict[str, object]:
    """What this build of gem_fast is made of.

    Returns:
        version, compiler, torch_built_with, torch_at_least (the oldest torch that the binary serves), torch (the one
        running), pybind11, simd_levels (that this processor and the binary have in common), simd_in_use, nvcc (its
        version) and cuda_architectures (compute capabilities); the last two are empty when CUDA was left out.
    """
    return {**_C.build_info(), "torch": str(torch.__version__)}
