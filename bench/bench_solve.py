"""The solver alone, called from Python on NumPy arrays as its rivals are, and as a torch operator."""

import daqp
import numpy as np
import piqp
import pytest
import quadprog
import torch
from interleave import interleave
from pytest_benchmark.fixture import BenchmarkFixture

from gem_fast import ops, solver


@pytest.mark.parametrize("entry", ["numpy", "torch"])
@pytest.mark.parametrize("t", [3, 10, 20, 50, 100, 200])
def bench_solve(benchmark: BenchmarkFixture, t: int, entry: str) -> None:
    # Gradients of related tasks share a part of their direction; about half of the constraints become active.
    rng = np.random.default_rng(t)
    G = rng.standard_normal((t, 4 * t)) + 0.3 * rng.standard_normal(4 * t)
    P, q = G @ G.T, G @ rng.standard_normal(4 * t)
    P_torch, q_torch = torch.from_numpy(P), torch.from_numpy(q)
    identity, zeros = np.eye(t), np.zeros(t)
    no_rows, above = np.zeros((0, t)), np.full(t, 1e30)
    P_columns = np.asfortranarray(P)

    def with_piqp() -> np.ndarray:
        dense = piqp.DenseSolver()
        dense.setup(P_columns, q, x_l=zeros)
        dense.solve()
        return dense.result.x

    solvers = {
        "quadprog": lambda: quadprog.solve_qp(P, -q, identity, zeros)[0],
        "DAQP": lambda: daqp.solve(P, q, no_rows, above, zeros)[0],
        "PIQP": with_piqp,
    }
    ours = {"numpy": lambda: solver.nnqp(P, q)[0], "torch": lambda: ops.nnqp(P_torch, q_torch).v}[entry]
    for solve in solvers.values():
        np.testing.assert_allclose(ours(), solve(), atol=1e-6)
    interleave(benchmark, ours, solvers, rounds=300)
