import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from utils.asserts import assert_same_bits
from utils.problems import DTYPES
from utils.samplers import SAMPLERS, sample

from gem_fast import Status, ops, project_, reference


def as_grads(g: np.ndarray, dtype: torch.dtype) -> list[torch.Tensor]:
    return [part.clone() for part in torch.from_numpy(g).to(dtype).tensor_split(3)]


@settings(max_examples=200)
@given(
    kind=st.sampled_from([kind for kind in SAMPLERS if kind != "nearly_conflicting"]),
    t=st.integers(1, 20),
    p=st.integers(1, 400),
    margin=st.sampled_from([0.0, 0.5, 10.0]),
    ridge=st.sampled_from([0.0, 1e-3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_past_loss_rises(kind: str, t: int, p: int, margin: float, ridge: float, seed: int) -> None:
    G, g = sample(np.random.default_rng(seed), kind, t, p)
    grads = as_grads(g, torch.float64)
    v, q, status, residual = project_(grads, torch.from_numpy(G), margin, ridge)
    projected = torch.cat(grads).numpy()
    assert status == Status.SOLVED
    assert residual <= 1e-6
    if not (q < 0).any():
        np.testing.assert_array_equal(projected, g)
        assert not v.any()
        return
    assert (v >= margin).all()
    lengths = np.linalg.norm(G, axis=1)
    scale = lengths * max(np.linalg.norm(g), float(np.abs(v.numpy() * lengths).max()))
    # With a ridge the multipliers are those of a slightly other problem: g_k . g~ >= -ridge v_k.
    assert (G @ projected + ridge * v.numpy() >= -1e-7 * scale - 1e-12).all()


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("margin", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("t", [1, 3, 10, 19])
def test_equals_the_reference(t: int, margin: float, ridge: float, simd_level: str) -> None:
    rng = np.random.default_rng(t)
    G, g = rng.standard_normal((t, 3000)), rng.standard_normal(3000)
    for shift in (0.0, 0.05, -0.05):  # nothing, little and much violated
        gradient = g + shift * G.sum(0)
        expected, v_expected = reference.project(gradient, G, margin, ridge)
        grads = as_grads(gradient, torch.float64)
        projection = project_(grads, torch.from_numpy(G), margin, ridge)
        np.testing.assert_allclose(torch.cat(grads).numpy(), expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(projection.v.numpy(), v_expected, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_one_call_is_the_stages_in_turn(dtype: torch.dtype, margin: float) -> None:
    for shift in (0.05, -0.02, -0.2):
        G = torch.randn(9, 5000).to(dtype)
        grads = [(torch.randn(5000) + shift * G.float().sum(0)).to(dtype)]
        stages = [grads[0].clone()]
        P, q = ops.gram(G, stages)
        if (q < 0).any():
            ops.combine_(stages, G, ops.nnqp(P, q, lower=margin).v)
        project_(grads, G, margin)
        tolerance = 2 * float(torch.finfo(dtype).eps)
        assert torch.allclose(grads[0].double(), stages[0].double(), rtol=tolerance, atol=10 * tolerance)


def test_without_violation_every_bit_stays() -> None:
    G = torch.randn(4, 1000)
    grads = [G.sum(0) * 10]
    grads[0][0] = -0.0
    G[:, 0] = 1.0
    before = grads[0].clone()
    projection = project_(grads, G)
    assert not projection.violations.any()
    assert not projection.v.any()
    assert_same_bits(grads[0], before)


def test_where_the_margin_suffices_it_is_the_answer() -> None:
    # Rows that agree, and a gradient slightly against them: v = margin for every task is optimal, and exactly so.
    base = torch.randn(2000)
    G = base + 0.1 * torch.randn(6, 2000)
    grads = [-0.1 * base]
    projection = project_(grads, G, margin=0.5)
    assert projection.violations.any()
    assert projection.v.tolist() == [0.5] * 6
    solved = ops.nnqp((G @ G.T).double(), (G @ (-0.1 * base)).double(), lower=0.5)
    assert solved.v.tolist() == [0.5] * 6


@pytest.mark.parametrize("t", [0, 1])
def test_empty_problems(t: int) -> None:
    grads = [torch.zeros(0)]
    projection = project_(grads, torch.zeros(t, 0))
    assert projection.v.shape == (t,)
    assert projection.status == Status.SOLVED


def test_no_tasks_leave_the_gradient() -> None:
    grads = [torch.randn(5)]
    before = grads[0].clone()
    assert project_(grads, torch.zeros(0, 5)).v.shape == (0,)
    assert_same_bits(grads[0], before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["G", "grads"])
def test_non_finite_leaves_the_gradient(bad: float, where: str) -> None:
    G, grads = torch.randn(3, 500), [torch.randn(200), torch.randn(300)]
    (G[1] if where == "G" else grads[1])[7] = bad
    before = [x.clone() for x in grads]
    with pytest.raises(RuntimeError, match="in row 1" if where == "G" else "grads must be finite"):
        project_(grads, G)
    for x, y in zip(grads, before, strict=True):
        assert_same_bits(x, y)


def test_overflow_is_named() -> None:
    G = torch.full((2, 10), 1e30)
    with pytest.raises(RuntimeError, match=r"inner products of G's rows and grads must be finite, got an overflow"):
        project_([torch.full((10,), -1e30)], G)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_any_scale(scale: float) -> None:
    rng = np.random.default_rng(0)
    G, g = rng.standard_normal((8, 300)), rng.standard_normal(300)
    one = as_grads(g, torch.float64)
    v_one = project_(one, torch.from_numpy(G), margin=0.0).v
    scaled = as_grads(g * scale, torch.float32)
    v_scaled = project_(scaled, torch.from_numpy(G * scale).float(), margin=0.0).v
    assert v_one.any()
    np.testing.assert_allclose(v_scaled, v_one, atol=1e-6)
    np.testing.assert_allclose(torch.cat(scaled).double().numpy() / scale, torch.cat(one).numpy(), atol=1e-5)


def test_rows_beyond_32_bit_offsets() -> None:
    # Memory that is never touched is never mapped: only the two rows are real.
    stride = 2**31 + 64
    storage = torch.empty(stride + 1000, dtype=torch.bfloat16)
    G = storage.as_strided((2, 1000), (stride, 1))
    G.copy_(torch.randn(2, 1000))
    grads = [-G.float().sum(0).bfloat16()]
    near = [grads[0].clone()]
    projection = project_(grads, G, margin=0.0)
    expected = project_(near, G.clone(), margin=0.0)
    assert projection.v.all()
    assert_same_bits(projection.v, expected.v)
    assert_same_bits(grads[0], near[0])


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_same_bits_for_any_number_of_threads(margin: float) -> None:
    G = torch.randn(9, 200_000)
    g = torch.randn(200_000) - 0.3 * G.sum(0)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            grads = [part.clone() for part in g.tensor_split(4)]
            projection = project_(grads, G, margin)
            results.append((torch.cat(grads), projection.v, projection.q))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            assert_same_bits(x, y)
