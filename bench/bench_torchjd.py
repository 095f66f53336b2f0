"""TorchJD's UPGrad: m quadratic programs in one call against quadprog, one after the other; and the whole weighting.

    python -m pytest bench_torchjd.py --benchmark-json=results/torchjd.json; python tables.py results/torchjd.json

About a minute. Around the quadratic programs a weighting has operators and modules of torch, the same in both.
"""

import pytest
import torch
import torchjd.aggregation
from interleave import interleave
from pytest_benchmark.fixture import BenchmarkFixture
from torchjd.linalg import QuadprogProjector

from gem_fast.integrations.torchjd import NnqpProjector, UPGradWeighting

sizes = pytest.mark.parametrize("m", [2, 5, 10, 20, 50, 100])


@sizes
def bench_upgrad_qps(benchmark: BenchmarkFixture, m: int) -> None:
    P, U = gramian(m), torch.eye(m) / m
    ours, theirs = NnqpProjector(), QuadprogProjector()
    torch.testing.assert_close(ours(U, P), theirs(U, P), rtol=1e-3, atol=1e-4)
    interleave(benchmark, lambda: ours(U, P), {"TorchJD": lambda: theirs(U, P)}, rounds=rounds(m))


@sizes
def bench_upgrad_weighting(benchmark: BenchmarkFixture, m: int) -> None:
    P = gramian(m)
    ours, theirs = UPGradWeighting(), torchjd.aggregation.UPGradWeighting()
    torch.testing.assert_close(ours(P), theirs(P), rtol=1e-3, atol=1e-4)
    interleave(benchmark, lambda: ours(P), {"TorchJD": lambda: theirs(P)}, rounds=rounds(m))


def gramian(m: int) -> torch.Tensor:
    torch.manual_seed(m)
    J = torch.randn(m, 4 * m) + 0.3 * torch.randn(4 * m)
    return J @ J.T


def rounds(m: int) -> int:
    return 300 if m < 50 else 10
