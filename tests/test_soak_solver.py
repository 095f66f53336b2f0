"""The soak's solver part, short: `make soak` runs a million of these problems."""

import numpy as np
import pytest
from soak.problems import APART, FAMILIES, problem
from soak.solver import BOUND, BOUND_APART, soak

from gem_fast import solver


def test_every_problem_meets_the_kkt_conditions() -> None:
    result = soak(seed=7, problems=4000, kinds=FAMILIES, bound=BOUND, rivals_every=10)
    assert result["failures"] == 0, result
    # Where a rival's answer is sound, ours is the same projection.
    for name in ("quadprog", "DAQP"):
        comparison = result["rivals"][name]
        assert comparison["sound"] > 20, comparison
        assert comparison["worst_excess_of_our_objective"] <= 1e-8, comparison
        assert comparison["worst_difference_of_projected_gradient"] <= 1e-4, comparison


def test_gradients_that_nearly_oppose_each_other() -> None:
    assert soak(seed=7, problems=500, kinds=(APART,), bound=BOUND_APART, rivals_every=10)["failures"] == 0


def test_a_step_that_rounding_spoiled_is_taken_back() -> None:
    # At the minimum of this problem one more constraint enters with a pivot that is rounding; the minimiser that
    # follows from it is far off, and the way back led through the same active sets until the limit.
    _, G, g, margin = problem(0, 28610, (APART,))
    _, status, residual, iterations = solver.nnqp(G @ G.T, G @ g, margin)
    assert status == 0
    assert residual <= 1e-11
    assert iterations <= 20


def test_a_wrong_answer_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = solver.nnqp

    def off_by_a_little(P: np.ndarray, q: np.ndarray, lower: float) -> tuple[np.ndarray, ...]:
        v, *rest = solve(P, q, lower)
        return v * (1 + 1e-7), *rest

    monkeypatch.setattr(solver, "nnqp", off_by_a_little)
    assert soak(seed=7, problems=80, kinds=FAMILIES, bound=BOUND, rivals_every=10)["failures"] > 10


@np.errstate(all="ignore")
@pytest.mark.parametrize("kind", ["any bits", "indefinite", "not symmetric", "overflow", "underflow"])
def test_any_input_ends_with_an_honest_status(kind: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(3000):
        t = int(rng.integers(1, 20))
        A, q = rng.standard_normal((t, t)), rng.standard_normal(t)
        if kind == "any bits":
            A, q = (rng.integers(0, 2**64, shape, np.uint64).view(np.float64) for shape in ((t, t), t))
        elif kind == "indefinite":
            A = A + A.T
        elif kind == "overflow":
            s = 10.0 ** rng.uniform(140, 160, (t, 1))
            A, q = (A * s) @ (A * s).T, q * 10.0 ** rng.uniform(0, 308, t)
        elif kind == "underflow":
            s = 10.0 ** rng.uniform(-170, -140, (t, 1))
            A = (A * s) @ (A * s).T
        lower = float(rng.choice([0.0, 0.5, 1e300]))
        v, status, residual, iterations = solver.nnqp(A, q, lower)
        assert np.isfinite(v).all()
        assert iterations <= 100 + 20 * t
        assert status != 0 or ((v >= lower).all() and residual <= 1e-6)


def test_a_multiplier_too_large_for_float64_is_no_answer() -> None:
    v, status, residual, _ = solver.nnqp(np.array([[1e-300]]), np.array([-1e300]))
    assert (v.item(), status.item(), residual.item()) == (0.0, 1, np.inf)
