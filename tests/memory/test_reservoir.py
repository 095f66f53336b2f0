"""The reservoir: every example is as likely to be kept as any other, whatever the sizes of mini-batches."""

import pytest
import torch
from utils.memory_streams import batch, numbers, seen_by

from gem_fast import ReservoirMemory

RUNS = 1000
# The 0.1 % quantiles of the chi-square distribution at both ends, by its degrees of freedom.
CHI_SQUARE = {29: (11.0, 58.3), 19: (5.4, 43.8)}


def chi_square(counts: torch.Tensor, kept: int) -> float:
    """The statistic for samples of `kept` without replacement, whose covariance is not the multinomial's."""
    n = len(counts)
    expected = RUNS * kept / n
    variance = expected * (1 - kept / n)
    return float(((counts - expected) ** 2 / variance).sum() * (n - 1) / n)


@pytest.mark.parametrize("n_batch", [1, 7, 30])
def test_uniform(n_batch: int) -> None:
    counts = torch.zeros(30)
    for run in range(RUNS):
        memory = ReservoirMemory(per_task=6, seed=run)
        for first in range(0, 30, n_batch):
            memory.observe(*batch(first, min(n_batch, 30 - first)), "a")
        counts[numbers(memory, "a")] += 1
    assert counts.sum() == 6 * RUNS
    low, high = CHI_SQUARE[29]
    assert low < chi_square(counts, 6) < high


def test_uniform_after_shrinking_and_coming_back() -> None:
    counts = torch.zeros(20)
    for run in range(RUNS):
        memory = ReservoirMemory(total=12, seed=run)
        seen_by(memory, [(0, 14), (1, 1), (2, 1), (0, 6)])  # 12 of the first task's are kept, then 6, then 4
        counts[numbers(memory, 0)] += 1
    low, high = CHI_SQUARE[19]
    assert low < chi_square(counts, 4) < high


def test_the_seed_decides_and_torchs_generator_does_not() -> None:
    kept = []
    for seed, other in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(other)
        before = torch.get_rng_state()
        memory = ReservoirMemory(per_task=5, seed=seed)
        seen_by(memory, [(0, 9), (1, 9), (0, 9)])
        assert torch.equal(torch.get_rng_state(), before)
        kept.append([numbers(memory, task) for task in (0, 1)])
    assert kept[0] == kept[1] != kept[2]


def test_an_example_that_is_not_kept_leaves_no_trace() -> None:
    memory = ReservoirMemory(per_task=1)
    versions = set()
    for i in range(200):
        memory.observe(*batch(i, 1), 0)
        versions.add((memory.examples(0)[0]._version, *numbers(memory, 0)))
    assert 1 < len(versions) < 30  # about ln 200 of them were kept for a while
    assert len({version for version, _ in versions}) == len({number for _, number in versions}) == len(versions)


@pytest.mark.parametrize("generator", [torch.zeros(3), "seed", None, torch.zeros(5056).byte()])
def test_hostile_generators(generator: object) -> None:
    memory = ReservoirMemory(per_task=5)
    seen_by(memory, [(0, 9)])
    before = memory.state_dict()
    with pytest.raises(ValueError, match=r"generator must be the state of a torch\.Generator on the CPU, got another"):
        memory.load_state_dict({**before, "generator": generator})
    assert torch.equal(memory.state_dict()["generator"], before["generator"])
