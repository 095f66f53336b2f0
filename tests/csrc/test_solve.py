import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from utils.asserts import assert_same_bits, kkt_violation
from utils.samplers import SAMPLERS, sample

from gem_fast import Status, ops, reference, solver


def residual_bound(kind: str) -> float:
    # Gradients that oppose each other to within 1e-8 of their length are resolved by P only to the square root of
    # float64's precision.
    return 1e-6 if kind == "nearly_conflicting" else 1e-9


@settings(max_examples=400)
@given(
    kind=st.sampled_from(list(SAMPLERS)),
    t=st.integers(1, 60),
    p=st.sampled_from([1, 2, 5, 20, 100]),
    spread=st.sampled_from([0.0, 3.0, 12.0]),
    lower=st.sampled_from([0.0, 0.5, 1.0, 1e3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_hard_problem_meets_the_kkt_conditions(
    kind: str, t: int, p: int, spread: float, lower: float, seed: int
) -> None:
    G, g = sample(np.random.default_rng(seed), kind, t, p, spread)
    P, q = G @ G.T, G @ g
    v, status, residual, _ = solver.nnqp(P, q, lower)
    assert status == Status.SOLVED
    assert (v >= lower).all()
    assert kkt_violation(P, q, v, lower) <= residual_bound(kind)
    assert residual <= residual_bound(kind)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_many_hard_problems(kind: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        G, g = sample(rng, kind, int(rng.integers(1, 30)), int(rng.integers(1, 60)), float(rng.choice([0, 12])))
        lower = float(rng.choice([0, 0.5]))
        P, q = G @ G.T, G @ g
        v, _, _, iterations = solver.nnqp(P, q, lower)
        assert (v >= lower).all()
        assert kkt_violation(P, q, v, lower) <= residual_bound(kind)
        assert iterations <= 6 + 2 * len(q)


@pytest.mark.parametrize("lower", [0.0, 0.5])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("t", [1, 2, 3, 10, 19, 50, 128])
def test_equals_quadprog_where_it_succeeds(t: int, lower: float, ridge: float, simd_level: str) -> None:
    rng = np.random.default_rng(t)
    G, g = rng.standard_normal((t, 2 * t)), rng.standard_normal(2 * t)
    P, q = G @ G.T, G @ g
    v = ops.nnqp(torch.from_numpy(P), torch.from_numpy(q), lower, ridge).v.numpy()
    np.testing.assert_allclose(v, reference.nnqp(P, q, lower, ridge), atol=1e-9)


@pytest.mark.parametrize("t", [1, 5, 40])
def test_projection_never_lengthens_the_gradient(t: int) -> None:
    # The projection onto a convex cone is a contraction, however badly P is conditioned.
    rng = np.random.default_rng(t)
    for kind in SAMPLERS:
        G, g = sample(rng, kind, t, 20)
        v = solver.nnqp(G @ G.T, G @ g)[0]
        assert np.linalg.norm(g + G.T @ v) <= np.linalg.norm(g) * (1 + 1e-6), kind


def test_solution_scales_with_the_gradients() -> None:
    # Scaling row k by s_k scales v_k by 1 / s_k: powers of two leave every bit but the exponents alone.
    rng = np.random.default_rng(0)
    G, g = rng.standard_normal((12, 30)), rng.standard_normal(30)
    s = 2.0 ** rng.integers(-40, 40, 12)
    v = solver.nnqp(G @ G.T, G @ g)[0]
    scaled = solver.nnqp((G @ G.T) * np.outer(s, s), (G @ g) * s)[0]
    np.testing.assert_array_equal(scaled * s, v)


def test_nothing_to_do() -> None:
    v, status, residual = ops.nnqp(torch.eye(3).double(), torch.ones(3).double(), lower=0.5)
    assert v.tolist() == [0.5] * 3
    assert status == Status.SOLVED
    assert residual == 0


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (0,), (40,)])
@pytest.mark.parametrize("shared", [True, False])
def test_batches_are_solved_one_by_one(shape: tuple[int, ...], shared: bool) -> None:
    t = 6
    G = torch.randn(*(() if shared else shape), t, 20).double()
    P = G @ G.mT
    q = torch.randn(*shape, t).double()
    v, status, residual = ops.nnqp(P, q, 0.5, 1e-3)
    assert v.shape == q.shape
    assert status.shape == residual.shape == shape
    for index in np.ndindex(*shape):
        one = ops.nnqp(P if shared else P[index], q[index], 0.5, 1e-3)
        assert_same_bits(one.v, v[index])
        assert_same_bits(one.residual, residual[index])


def test_numpy_entry_is_the_same_solver() -> None:
    rng = np.random.default_rng(3)
    G = rng.standard_normal((5, 8, 20))
    P, q = G @ G.transpose(0, 2, 1), rng.standard_normal((5, 8))
    v, status, residual, iterations = solver.nnqp(P, q, lower=0.5)
    theirs = ops.nnqp(torch.from_numpy(P), torch.from_numpy(q), 0.5)
    np.testing.assert_array_equal(v, theirs.v.numpy())
    np.testing.assert_array_equal(status, theirs.status.numpy())
    np.testing.assert_array_equal(residual, theirs.residual.numpy())
    assert iterations.shape == (5,)


def test_no_constraints() -> None:
    v, status, _ = ops.nnqp(torch.zeros(0, 0).double(), torch.zeros(0).double())
    assert v.shape == (0,)
    assert status == Status.SOLVED
    assert solver.nnqp(np.zeros((0, 0)), np.zeros(0))[1] == Status.SOLVED


@pytest.mark.parametrize(
    ("P", "q"),
    [([[0.0]], [-1.0]), ([[1.0, -1.0], [-1.0, 1.0]], [-1.0, -1.0]), ([[-1.0]], [1.0])],
    ids=["no curvature", "unbounded along a null vector", "negative curvature"],
)
def test_problems_without_a_minimum_are_reported(P: list[list[float]], q: list[float]) -> None:
    v, status, residual = ops.nnqp(torch.tensor(P).double(), torch.tensor(q).double())
    assert status == Status.INACCURATE
    assert residual > 0.1
    assert v.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite(bad: float) -> None:
    P, q = torch.eye(3).double().repeat(4, 1, 1), -torch.ones(4, 3).double()
    q[2, 1] = bad
    with pytest.raises(RuntimeError, match="P and q must be finite, got a NaN or an infinity in problem 2"):
        ops.nnqp(P, q)
    q[2, 1], P[0, 1, 2] = -1, bad
    with pytest.raises(RuntimeError, match="in problem 0"):
        ops.nnqp(P, q)
    v, status, _, _ = solver.nnqp(P.numpy(), q.numpy())
    assert status.tolist() == [Status.NON_FINITE, 0, 0, 0]
    assert (v[0] == 0).all()


@pytest.mark.parametrize(
    ("P", "q", "options", "message"),
    [
        (np.eye(3), np.ones(2), {}, r"P must have shape \(t, t\)"),
        (np.ones((2, 3, 3)), np.ones((4, 3)), {}, r"P must have shape \(t, t\)"),
        (np.eye(1), np.float64(1.0), {}, r"q must have shape \(\.\.\., t\), got \(\)"),
        (np.eye(3), np.ones(3), {"lower": np.nan}, "lower must be finite"),
        (np.eye(3), np.ones(3), {"ridge": -1.0}, "ridge must be finite and not negative"),
    ],
)
def test_numpy_entry_refuses_bad_input(P: object, q: object, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solver.nnqp(P, q, **options)
