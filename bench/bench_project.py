"""The projection alone, gram to write-back, on real gradients of the paper's network (p = 89,610)."""

import numpy as np
import pytest
import quadprog
import torch
from gradients import Problem, gradient_problems
from interleave import THREADS_ASLEEP, interleave
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torchjd.aggregation import DualProj
from training import DEVICE, MARGIN, RIDGE, new_model

import gem_fast
from gem_fast import reference


@pytest.mark.parametrize("kind", ["margin", "qp"])
@pytest.mark.parametrize("t", [3, 10, 19])
def bench_project(benchmark: BenchmarkFixture, t: int, kind: str) -> None:
    problem = gradient_problems(t)[kind][0]
    # Public versions collect gradients in columns, and the current one comes last.
    columns = torch.cat([problem.G, torch.zeros(1, problem.G.shape[1], device=DEVICE)]).t().contiguous()
    jacobian = torch.cat([flat(problem.grads).unsqueeze(0), problem.G])
    dual_projection = DualProj(pref_vector=torch.eye(t + 1, device=DEVICE)[0])
    grads = [x.clone() for x in problem.grads]

    def fresh() -> list[Tensor]:
        # Every method projects the same incoming gradient, and pays for this copy.
        torch._foreach_copy_(grads, problem.grads)
        return grads

    def torch_quadprog() -> None:
        project_with_torch_and_quadprog_(fresh(), problem)

    def torchjd() -> None:
        write_(fresh(), dual_projection(jacobian))

    exact = flat(problem.grads).double().cpu().numpy()
    exact, _ = reference.project(exact, problem.G.double().cpu().numpy(), MARGIN, RIDGE)
    methods = {
        "ours": lambda: gem_fast.project_(fresh(), problem.G, MARGIN, RIDGE),
        "published method": lambda: reference.project_columns_(fresh(), columns, MARGIN, RIDGE),
        "torch + quadprog": torch_quadprog,
        "TorchJD DualProj": torchjd,
    }
    for name in ("ours", "published method", "torch + quadprog"):
        methods[name]()
        np.testing.assert_allclose(flat(grads).cpu().numpy(), exact, atol=1e-4 * np.abs(exact).max())
    interleave(benchmark, methods.pop("ours"), methods, rounds=100, pause=THREADS_ASLEEP)


@pytest.mark.parametrize("rows", ["independent", "dependent"])
@pytest.mark.parametrize("t", [19, 100])
def bench_products(benchmark: BenchmarkFixture, t: int, rows: str) -> None:
    """What float64 products cost where gradients depend on each other (rank 5 but for 0.1 %), and where not."""
    p = sum(x.numel() for x in new_model().parameters())
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(t, p, generator=generator)
    if rows == "dependent":
        G = torch.randn(t, 5, generator=generator) @ G[:5] + 1e-3 * G
    g = torch.randn(p, generator=generator) - 0.1 * G.sum(0)
    G, g, grad = G.to(DEVICE), g.to(DEVICE), g.to(DEVICE, copy=True)

    def project() -> None:
        gem_fast.project_([grad.copy_(g)], G, 0.0)

    def stages() -> None:
        P, q = gem_fast.ops.gram(G, [grad.copy_(g)])
        gem_fast.ops.combine_([grad], G, gem_fast.ops.nnqp(P, q).v)

    interleave(benchmark, project, {"stages, float32 products": stages}, rounds=30, pause=THREADS_ASLEEP)


def project_with_torch_and_quadprog_(grads: list[Tensor], problem: Problem) -> None:
    """What a careful user would write: everything large in torch, only the (t, t) problem in NumPy."""
    g = flat(grads)
    q = problem.G @ g
    if bool((q < 0).any()):
        t = len(q)
        P = (problem.G @ problem.G.T).double().cpu().numpy() + RIDGE * np.eye(t)
        v = quadprog.solve_qp(P, -q.double().cpu().numpy(), np.eye(t), np.full(t, MARGIN))[0]
        write_(grads, g + torch.from_numpy(v).float().to(DEVICE) @ problem.G)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def write_(grads: list[Tensor], g: Tensor) -> None:
    torch._foreach_copy_(
        grads, [part.view_as(x) for part, x in zip(g.split([x.numel() for x in grads]), grads, strict=True)]
    )
