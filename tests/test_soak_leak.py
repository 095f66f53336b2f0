"""The soak's memory part, short: `make soak` takes 100,000 steps."""

import pytest
import torch
from soak.leak import ACTIVITIES, measure


@pytest.mark.parametrize("activity", ACTIVITIES)
def test_memory_stays_flat(activity: str) -> None:
    measured = measure(ACTIVITIES[activity](), 3000)
    assert measured["flat"], measured


@pytest.mark.parametrize("kilobytes", [1, 0])
def test_a_leak_is_seen(kilobytes: int) -> None:
    kept: list[object] = []
    measured = measure(lambda number: kept.append(torch.empty(256 * kilobytes).fill_(number)), 3000)
    assert not measured["flat"], measured
