import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from utils.asserts import assert_as_accurate_as_torch, assert_same_bits
from utils.problems import DTYPES, problem

from gem_fast import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("t", "p"), [(1, 1), (1, 7), (2, 1023), (3, 1024), (5, 1025), (19, 9000), (70, 3001), (130, 700)]
)
def test_equals_float64(t: int, p: int, dtype: torch.dtype, simd_level: str) -> None:
    G, grads = problem(t, p, dtype)
    P, q = ops.gram(G, grads)
    g = torch.cat(grads)
    assert P.dtype == q.dtype == torch.float64
    # Torch sums in the processor's widest vectors; in narrower ones each lane's sum is longer.
    slack = 1e-7 if simd_level == ops.build_info()["simd_levels"][-1] else 1e-6
    assert_as_accurate_as_torch(P, G @ G.T, G.double() @ G.double().T, slack)
    assert_as_accurate_as_torch(q, G @ g, G.double() @ g.double(), slack)
    assert_same_bits(P, P.T.contiguous())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    t=st.integers(0, 12),
    sizes=st.lists(st.sampled_from([0, 0, 1, 2, 5, 60, 1024, 1500]), min_size=1, max_size=8),
    offset=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shapes_and_slices(t: int, sizes: list[int], offset: int, dtype: torch.dtype) -> None:
    p = sum(sizes)
    G = torch.randn(t + 1, p + 5).to(dtype)[:t, offset : offset + p]
    grads = list(torch.randn(p).to(dtype).split(sizes))
    P, q = ops.gram(G, grads)
    g = torch.cat(grads).double()
    assert torch.allclose(P, G.double() @ G.double().T, rtol=1e-5, atol=1e-4 * max(p, 1))
    assert torch.allclose(q, G.double() @ g, rtol=1e-5, atol=1e-4 * max(p, 1))


def test_strided_tensors() -> None:
    G = torch.randn(40, 6).T
    grads = [
        torch.randn(5, 4).T,
        torch.randn(2, 2, 3, 3).to(memory_format=torch.channels_last)[:, :1, :1, :],
        torch.randn(28)[::2],
    ]
    P, q = ops.gram(G, grads)
    g = torch.cat([x.reshape(-1) for x in grads])
    assert torch.allclose(P, (G @ G.T).double(), rtol=1e-5)
    assert torch.allclose(q, (G @ g).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [5000, 300_000])
def test_same_bits_for_any_number_of_threads(p: int) -> None:
    G, grads = problem(7, p, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.gram(G, grads))
    finally:
        torch.set_num_threads(threads)
    for P, q in results[1:]:
        assert_same_bits(P, results[0][0])
        assert_same_bits(q, results[0][1])


def test_block_sums_do_not_lose_small_terms() -> None:
    # A float32 running sum would stop growing at 2^24.
    G = torch.ones(1, 20_000_000)
    P, _ = ops.gram(G, [G[0]])
    assert P.item() == 20_000_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_names_the_row(bad: float) -> None:
    G, grads = problem(4, 3000, torch.float32)
    G[2, 2999] = bad
    with pytest.raises(RuntimeError, match="G must be finite, got a NaN or an infinity in row 2"):
        ops.gram(G, grads)
    G[2, 2999] = 0
    grads[1][5] = bad
    with pytest.raises(RuntimeError, match="grads must be finite"):
        ops.gram(G, grads)
