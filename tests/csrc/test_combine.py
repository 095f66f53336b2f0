import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from utils.asserts import assert_as_accurate_as_torch, assert_same_bits
from utils.problems import DTYPES, problem

from gem_fast import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "p"), [(1, 1), (3, 511), (4, 513), (9, 5000), (19, 20000)])
def test_equals_float64(t: int, p: int, dtype: torch.dtype, simd_level: str) -> None:
    G, grads = problem(t, p, dtype)
    v = torch.rand(t).double()
    before = torch.cat(grads)
    ops.combine_(grads, G, v)
    exact = before.double() + v @ G.double()
    assert_as_accurate_as_torch(torch.cat(grads), before + v.to(dtype) @ G, exact)
    # The sum is kept in float64, so what is written is the exact result rounded once (twice for 16 bits, by way of
    # float32).
    assert torch.allclose(torch.cat(grads).double(), exact, rtol=float(torch.finfo(dtype).eps), atol=1e-12)


def test_rows_without_weight_are_not_read() -> None:
    G, grads = problem(5, 3000, torch.float32)
    G[1], G[3] = float("nan"), float("inf")
    v = torch.tensor([0.5, 0, 1, 0, -2]).double()
    ops.combine_(grads, G, v)
    assert all(x.isfinite().all() for x in grads)


def test_all_weights_zero_leaves_every_bit() -> None:
    G, grads = problem(5, 3000, torch.float32)
    grads[0][0] = -0.0
    before = [x.clone() for x in grads]
    ops.combine_(grads, G, torch.zeros(5).double())
    for x, y in zip(grads, before, strict=True):
        assert_same_bits(x, y)


@settings(max_examples=50)
@given(t=st.integers(0, 9), sizes=st.lists(st.sampled_from([0, 1, 3, 500, 5000]), min_size=1, max_size=7))
def test_any_sizes_and_strides(t: int, sizes: list[int]) -> None:
    p = sum(sizes)
    G = torch.randn(t, p + 3)[:, 1 : p + 1]
    storage = [torch.randn(n, 2) for n in sizes]
    grads = [x[:, 0] for x in storage]
    untouched = [x[:, 1].clone() for x in storage]
    v = torch.randn(t).double()
    exact = torch.cat(grads).double() + v @ G.double()
    ops.combine_(grads, G, v)
    assert torch.allclose(torch.cat(grads).double(), exact, rtol=1e-6, atol=1e-6)
    assert all(x[:, 1].equal(y) for x, y in zip(storage, untouched, strict=True))


def test_channels_last_keeps_its_format() -> None:
    grad = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    G, before = torch.randn(2, grad.numel()), grad.clone()
    v = torch.tensor([1.0, 2.0]).double()
    ops.combine_([grad], G, v)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(grad, before + (v.float() @ G).view_as(before), atol=1e-5)


def test_non_finite_weight_leaves_the_gradient() -> None:
    G, grads = problem(2, 10, torch.float32)
    before = torch.cat(grads)
    with pytest.raises(RuntimeError, match="v must be finite, got a NaN or an infinity at 1"):
        ops.combine_(grads, G, torch.tensor([1.0, float("nan")]).double())
    assert_same_bits(torch.cat(grads), before)
