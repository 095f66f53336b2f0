"""The class-balanced memory: the last examples of each class, in equal numbers."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_fast import ClassBalancedMemory


def expected(y: list[int], size: int) -> set[int]:
    """First the last example of every class, then the last but one, and so on; the newest first among equals."""
    rank = [y[i + 1 :].count(y[i]) for i in range(len(y))]
    return set(sorted(range(len(y)), key=lambda i: (rank[i], -i))[:size])


@settings(max_examples=40)
@given(
    size=st.integers(1, 12),
    batches=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=9),
)
def test_the_same_as_choosing_among_all_that_was_seen(size: int, batches: list[list[int]]) -> None:
    memory = ClassBalancedMemory(per_task=size)
    seen: list[int] = []
    for labels in batches:
        y = torch.tensor(labels)
        memory.observe(torch.arange(len(seen), len(seen) + len(y))[:, None], y, "a")
        seen += labels
        x, y = memory.examples("a")
        assert set(x.flatten().tolist()) == expected(seen, size)
        assert [seen[i] for i in x.flatten()] == y.tolist()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(2, 20))
@settings(max_examples=40)
def test_shrinking_is_choosing_again(labels: list[int], total: int) -> None:
    memory = ClassBalancedMemory(total=total)
    memory.observe(torch.arange(len(labels))[:, None], torch.tensor(labels), 0)
    memory.observe(torch.zeros(1, 1).long(), torch.zeros(1).long(), 1)
    assert set(memory.examples(0)[0].flatten().tolist()) == expected(labels, total // 2)


def test_equal_numbers() -> None:
    memory = ClassBalancedMemory(per_task=20)
    y = torch.cat([torch.zeros(500), torch.ones(30), torch.full((3,), 2), torch.full((100,), 3)]).long()
    for part in y[torch.randperm(len(y))].split(10):
        memory.observe(torch.zeros(len(part), 1), part, 0)
    assert memory.examples(0)[1].bincount().sort().values.tolist() == [3, 5, 6, 6]
