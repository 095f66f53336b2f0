"""TorchJD's UPGrad weighting: m quadratic programs in one call against quadprog, one after the other."""

import pytest
import torch
import torchjd.aggregation
from interleave import interleave
from pytest_benchmark.fixture import BenchmarkFixture

from gem_fast.integrations.torchjd import UPGradWeighting


@pytest.mark.parametrize("m", [2, 5, 10, 20, 50, 100])
def bench_upgrad_weighting(benchmark: BenchmarkFixture, m: int) -> None:
    torch.manual_seed(m)
    J = torch.randn(m, 4 * m) + 0.3 * torch.randn(4 * m)
    gramian = J @ J.T
    ours, theirs = UPGradWeighting(), torchjd.aggregation.UPGradWeighting()
    torch.testing.assert_close(ours(gramian), theirs(gramian), rtol=1e-3, atol=1e-4)
    interleave(benchmark, lambda: ours(gramian), {"TorchJD": lambda: theirs(gramian)}, rounds=100 if m < 50 else 10)
