"""The paper's memory: the last examples of each task."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gem_fast import EpisodicMemory


def batch(first: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Examples first, first + 1, ..., told apart by their numbers."""
    y = torch.arange(first, first + n)
    return y[:, None].float().repeat(1, 3), y


def kept(memory: EpisodicMemory, task: object) -> list[int]:
    x, y = memory.examples(task)
    assert x[:, 0].tolist() == y.tolist()
    return sorted(y.tolist())


@given(per_task=st.integers(1, 12), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_keeps_the_last_m(per_task: int, sizes: list[int]) -> None:
    memory = EpisodicMemory(per_task=per_task)
    seen = 0
    for n in sizes:
        memory.observe(*batch(seen, n), task="a")
        seen += n
        assert kept(memory, "a") == list(range(max(0, seen - per_task), seen))


@given(
    total=st.integers(6, 30), batches=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=12)
)
def test_total_is_shared_by_the_tasks_seen(total: int, batches: list[tuple[int, int]]) -> None:
    memory = EpisodicMemory(total=total)
    seen: dict[int, int] = {}
    expected: dict[int, int] = {}
    for task, n in batches:
        start = seen.get(task, 0)
        memory.observe(*batch(start, n), task=task)
        seen[task] = start + n
        size = total // len(seen)
        expected[task] = min(expected.get(task, 0) + n, size)
        expected = {other: min(count, size) for other, count in expected.items()}
        assert len(memory) <= total
        for other, count in seen.items():
            assert kept(memory, other) == list(range(count - expected[other], count))
