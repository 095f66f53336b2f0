import pytest
import torch
from hypothesis import given, settings
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


@settings(deadline=None)
@given(per_task=st.integers(1, 12), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_keeps_the_last_m(per_task: int, sizes: list[int]) -> None:
    memory = EpisodicMemory(per_task=per_task)
    seen = 0
    for n in sizes:
        memory.observe(*batch(seen, n), task="a")
        seen += n
        assert kept(memory, "a") == list(range(max(0, seen - per_task), seen))


@settings(deadline=None)
@given(
    total=st.integers(6, 30), visits=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=12)
)
def test_total_is_shared_by_the_tasks_seen(total: int, visits: list[tuple[int, int]]) -> None:
    memory = EpisodicMemory(total=total)
    seen: dict[int, int] = {}
    most: dict[int, int] = {}
    for task, n in visits:
        start = seen.get(task, 0)
        memory.observe(*batch(start, n), task=task)
        seen[task] = start + n
        size = total // len(seen)
        most[task] = min(most.get(task, 0) + n, size)
        most = {other: min(count, size) for other, count in most.items()}
        assert len(memory) <= total
        for other, count in seen.items():
            assert kept(memory, other) == list(range(count - most[other], count))


def test_memory_holds_copies() -> None:
    memory = EpisodicMemory(per_task=4)
    x, y = batch(0, 4)
    memory.observe(x.requires_grad_(), y, 0)
    with torch.no_grad():
        x.zero_()
    assert kept(memory, 0) == [0, 1, 2, 3]
    assert not memory.examples(0)[0].requires_grad


def test_tasks_in_order_of_first_sight() -> None:
    memory = EpisodicMemory(per_task=2)
    for task in ("b", ("c", 1), "b", 0):
        memory.observe(*batch(0, 1), task=task)
    assert memory.tasks == ["b", ("c", 1), 0]
    with pytest.raises(KeyError, match="task must be one that was observed, got 7"):
        memory.examples(7)


@pytest.mark.parametrize("options", [{"per_task": 5}, {"total": 11}])
def test_state_goes_on_where_it_was(options: dict[str, int]) -> None:
    one, two = EpisodicMemory(**options), EpisodicMemory(**options)
    one.observe(*batch(0, 7), task=0)
    one.observe(*batch(0, 2), task=1)
    two.load_state_dict(one.state_dict())
    for memory in (one, two):
        memory.observe(*batch(7, 3), task=0)
        memory.observe(*batch(2, 1), task=1)
    for task in one.tasks:
        assert all(a.equal(b) for a, b in zip(one.examples(task), two.examples(task), strict=True))
    with pytest.raises(ValueError, match="state must be of a memory with"):
        EpisodicMemory(per_task=99).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"per_task": 0}, ValueError, "per_task must be at least 1 example, got 0"),
        ({"total": -1}, ValueError, "total must be at least 1 example, got -1"),
        ({"per_task": 2.5}, TypeError, "per_task must be an integer, got float"),
        ({}, ValueError, "exactly one of per_task and total must be given, got per_task=None, total=None"),
        ({"per_task": 1, "total": 1}, ValueError, "exactly one of per_task and total must be given"),
    ],
)
def test_bad_sizes(options: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EpisodicMemory(**options)


@pytest.mark.parametrize(
    ("x", "y", "task", "error", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(3),
            0,
            ValueError,
            "x and y must have the same number of examples, got 2 and 3",
        ),
        (torch.zeros(0, 3), torch.zeros(0), 0, ValueError, r"x must hold at least one example, got shape \(0, 3\)"),
        ([1, 2], torch.zeros(2), 0, TypeError, "x must be a tensor, got list"),
        (torch.eye(3).to_sparse(), torch.zeros(3), 0, TypeError, "x must be a dense tensor, got a sparse one"),
        (torch.zeros(1, 3), torch.zeros(1).long(), [0], TypeError, "task must be a hashable id .*, got list"),
        (torch.zeros(1, 3), torch.zeros(1).long(), torch.tensor(0), TypeError, "got a tensor; use task.item()"),
        (
            torch.zeros(1, 4),
            torch.zeros(1).long(),
            0,
            ValueError,
            r"x must have the shape, dtype and device of the task's earlier examples, \(n, 3\) torch.float32 on cpu, "
            r"got \(n, 4\) torch.float32 on cpu",
        ),
        (torch.zeros(1, 3), torch.zeros(1), 0, ValueError, "y must have the shape, dtype and device"),
        (torch.zeros(1, 3), torch.zeros(1).long(), "new", ValueError, "total must be at least one example per task"),
    ],
)
def test_bad_examples_leave_the_memory(x, y, task, error: type[Exception], message: str) -> None:
    memory = EpisodicMemory(total=1)
    memory.observe(*batch(0, 1), task=0)
    before = memory.state_dict()
    with pytest.raises(error, match=message):
        memory.observe(x, y, task)
    after = memory.state_dict()
    assert memory.tasks == [0]
    assert after["tasks"][0]["x"].equal(before["tasks"][0]["x"])
