"""The soak's memory part, short: `make soak` takes 100,000 steps."""

from collections.abc import Iterator

import pytest
import torch
from soak.leak import ACTIVITIES, measure


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains nothing from more threads, and waits for them where others use the machine too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("activity", ACTIVITIES)
def test_memory_stays_flat(activity: str) -> None:
    step = ACTIVITIES[activity]()
    # Passes 1, 2, 4 ... 4096 are compared with the loop, which fills caches; the next of them, 8192, is not measured.
    for number in range(4500):
        step(number)
    measured = measure(step, 3000)
    assert measured["flat"], measured


@pytest.mark.parametrize("kilobytes", [1, 0])
def test_a_leak_is_seen(kilobytes: int) -> None:
    kept: list[object] = []
    measured = measure(lambda number: kept.append(torch.empty(256 * kilobytes).fill_(number)), 3000)
    assert not measured["flat"], measured
