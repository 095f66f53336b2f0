"""Tensors for the operators' fuzzer: every layout, dtype and value that can be handed to an operator by mistake."""

import numpy as np
import torch
from fuzz.draw import Draw
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e5m2)
SIZES = (0, 1, 2, 3, 4, 5, 8, 17, 33, 1025)
VALUES = (0.0, 1e-30, 1e30, float("nan"), float("inf"), 1e300)


def values(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """Float64 numbers: ordinary ones, and now and then a hard one among them."""
    rng = np.random.default_rng(draw.below(256))
    x = torch.from_numpy(rng.standard_normal(shape))
    kind = draw.below(8)
    if kind == 7 and x.numel():
        x.view(-1)[draw.below(min(x.numel(), 65536))] = draw.pick(VALUES)
    elif kind == 6:
        x.zero_()
    elif kind == 5:
        x *= 10.0 ** (draw.below(41) - 20)
    return x


def laid_out(draw: Draw, x: Tensor) -> Tensor:
    """The same numbers in another layout."""
    layout = draw.below(10)
    if layout == 1:  # every second element of a larger tensor
        return torch.stack([x, x], dim=-1)[..., 0]
    if layout == 2 and x.dim() >= 2:  # transposed in memory
        return x.mT.contiguous().mT
    if layout == 3 and x.dim() >= 1:  # rows or elements of a larger buffer
        return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
    if layout == 4:  # memory that begins inside an allocation
        return torch.cat([x.flatten(), x.flatten()])[x.numel() :].view(x.shape)
    if layout == 5 and x.dim() >= 1 and x.shape[0]:  # one element in several places
        return x[:1].expand(x.shape)
    if layout == 6 and x.numel() and x.is_floating_point():  # an address that is no multiple of the element's size
        raw = bytearray(1) + bytearray(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(raw, dtype=x.dtype, offset=1).view(x.shape)
    if layout == 7 and x.dtype in FLOATS:
        return torch._neg_view(x)  # negated when it is read
    return x


def fitting(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of the shape and dtype that is asked for."""
    return laid_out(draw, values(draw, shape).to(dtype))


def wild(draw: Draw) -> object:
    """Anything."""
    kind = draw.below(8)
    if kind == 0:
        return draw.pick([None, 3, 1.5, "text", [], [torch.ones(2)], np.ones((2, 2))])
    shape = tuple(draw.pick(SIZES[:-1]) for _ in range(draw.below(4)))
    x = values(draw, shape).to(draw.pick(FLOATS + OTHERS))
    if kind == 1:
        return x.to("meta")
    if kind == 2 and x.dtype in FLOATS:
        return x.to_sparse()
    if kind == 3 and x.dtype in FLOATS:
        return x.requires_grad_()
    if kind == 4 and x.is_contiguous() and x.numel() > 3:
        return x.as_strided((2, 3), (draw.below(2), draw.below(2)), 0)
    return laid_out(draw, x)
