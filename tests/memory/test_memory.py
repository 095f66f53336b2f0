"""What every memory policy has to keep to."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from utils.memory_streams import BATCHES, SIZES, batch, make, numbers, seen_by, through_a_file
from utils.training import train

from gem_fast import GEM, MEMORY_POLICIES, EpisodicMemory

every_policy = pytest.mark.parametrize("policy", MEMORY_POLICIES)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@every_policy
@settings(max_examples=40)
@given(sizes=SIZES, batches=BATCHES)
def test_sizes_under_any_sequence(policy: str, sizes: dict[str, int], batches: list[tuple[int, int]]) -> None:
    memory = make(policy, **sizes)
    seen: dict[int, int] = {}
    expected: dict[int, int] = {}
    for task, n in batches:
        seen = seen_by(memory, [(task, n)], seen)
        size = sizes.get("per_task") or sizes["total"] // len(seen)
        expected[task] = expected.get(task, 0) + n
        # What was evicted as the memory shrank is gone, whatever comes later.
        expected = {other: min(count, size) for other, count in expected.items()}
        assert memory.tasks == list(seen)
        for other, count in seen.items():
            kept = numbers(memory, other)
            assert len(kept) == len(set(kept)) == expected[other]
            assert set(kept) <= set(range(count))
        assert len(memory) == sum(expected.values())
    assert repr(memory).endswith(f": {len(memory)} examples of {len(seen)} tasks")


@every_policy
@settings(max_examples=40)
@given(sizes=SIZES, batches=BATCHES, more=BATCHES, asked=st.booleans())
def test_a_state_goes_on_where_it_was(policy, sizes, batches, more, asked) -> None:
    one, two = make(policy, **sizes), make(policy, **sizes)
    two.observe(*batch(3, 2), "something else")
    seen = seen_by(one, batches)
    if asked:
        numbers(one, batches[0][0])
    state = one.state_dict()
    before = copy.deepcopy(state)
    two.load_state_dict(through_a_file(state))
    assert same(two.state_dict(), state)
    assert len(one) == len(two)
    for memory in (one, two):
        seen_by(memory, more, seen)
        for task in memory.tasks:
            memory.examples(task)
    assert same(one.state_dict(), two.state_dict())
    for task in one.tasks:
        assert all(map(torch.equal, one.examples(task), two.examples(task)))
    assert same(state, before)  # which holds copies


@every_policy
@settings(max_examples=40)
@given(sizes=SIZES, batches=BATCHES)
def test_examples_that_did_not_change_are_the_same_tensors(policy, sizes, batches) -> None:
    memory = make(policy, **sizes)
    seen: dict[int, int] = {}
    before: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
    for task, n in batches:
        shrinks = "total" in sizes and task not in seen
        seen = seen_by(memory, [(task, n)], seen)
        for other in seen:
            identity = [(tensor.data_ptr(), tensor._version) for tensor in memory.examples(other)]
            kept = numbers(memory, other)
            if other in before and before[other][1] == identity:
                assert before[other][0] == kept  # a change shows
            if other in before and other != task and not shrinks:
                assert before[other][1] == identity  # no change does not
            assert [(tensor.data_ptr(), tensor._version) for tensor in memory.examples(other)] == identity
            before[other] = kept, identity


@every_policy
def test_memory_holds_copies(policy: str) -> None:
    memory = make(policy, per_task=4)
    x, y = batch(0, 4)
    memory.observe(x.requires_grad_(), y, 0)
    with torch.no_grad():
        x.zero_()
    assert sorted(numbers(memory, 0)) == [0, 1, 2, 3]
    assert not memory.examples(0)[0].requires_grad


@every_policy
def test_tasks_in_order_of_first_sight(policy: str) -> None:
    memory = make(policy, per_task=2)
    for task in ("b", ("c", 1), "b", 0):
        memory.observe(*batch(0, 1), task=task)
    assert memory.tasks == ["b", ("c", 1), 0]
    with pytest.raises(KeyError, match="task must be one that was observed, got 7"):
        memory.examples(7)


@every_policy
def test_a_memory_follows_its_model(policy: str) -> None:
    memory = make(policy, total=9)
    seen_by(memory, [(0, 4), (1, 5)])
    kept = [numbers(memory, task) for task in (0, 1)]
    assert memory.to(dtype=torch.float32) is memory
    for task in (0, 1):
        x, y = memory.examples(task)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert x[:, 0].tolist() == kept[task]
    x, y = batch(5, 3)
    memory.observe(x.float(), y, 1)
    assert len(memory) == 8
    with pytest.raises(TypeError, match=r"dtype must be a floating-point one, got torch\.int64"):
        memory.to(dtype=torch.int64)


@every_policy
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"per_task": 0}, ValueError, "per_task must be at least 1 example, got 0"),
        ({"total": -1}, ValueError, "total must be at least 1 example, got -1"),
        ({"per_task": 2.5}, TypeError, "per_task must be an integer, got float"),
        ({"total": True}, TypeError, "total must be an integer, got bool"),
        ({}, ValueError, "exactly one of per_task and total must be given, got per_task=None, total=None"),
        ({"per_task": 1, "total": 1}, ValueError, "exactly one of per_task and total must be given"),
    ],
)
def test_bad_sizes(policy: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(policy, **options)


X, Y = torch.zeros(1, 2).double(), torch.zeros(1).long()


@every_policy
@pytest.mark.parametrize(
    ("x", "y", "task", "error", "message"),
    [
        (X.repeat(2, 1), Y.repeat(3), 0, ValueError, "x and y must have the same number of examples, got 2 and 3"),
        (X[:0], Y[:0], 0, ValueError, r"x must hold at least one example, got shape \(0, 2\)"),
        ([1, 2], Y, 0, TypeError, r"x\[0\] must be a tensor, got int"),
        (torch.eye(2).to_sparse(), Y, 0, TypeError, "x must be a dense tensor, got a sparse one"),
        (X, Y, [0], TypeError, "task must be a hashable id .*, got list"),
        (X, Y, torch.tensor(0), TypeError, r"got a tensor; use task\.item\(\)"),
        (
            X.float(),
            Y,
            0,
            ValueError,
            r"x must have .* of the task's earlier examples, \(n, 2\) torch.float64 on cpu, ",
        ),
        (torch.zeros(1, 3), Y, 0, ValueError, r"got \(n, 3\) torch.float32 on cpu"),
        (X, Y.int(), 0, ValueError, "y must have the shape, dtype and device"),
        (X, Y, "new", ValueError, "total must be at least one example per task, got 1 for 2 tasks"),
    ],
)
def test_bad_examples_leave_the_memory(policy, x, y, task, error: type[Exception], message: str) -> None:
    memory = make(policy, total=1)
    memory.observe(*batch(4, 3), task=0)
    before = memory.state_dict()
    with pytest.raises(error, match=message):
        memory.observe(x, y, task)
    assert same(memory.state_dict(), before)


@pytest.mark.parametrize("policy", ["class-balanced", "herding"])
@pytest.mark.parametrize("y", [torch.zeros(2), torch.zeros(2, 1).long(), torch.zeros(2).bool()], ids=str)
def test_policies_that_need_classes(policy: str, y: Tensor) -> None:
    memory = make(policy, per_task=5)
    with pytest.raises(ValueError, match=r"y must be the examples' classes, integers of shape \(n,\), got"):
        memory.observe(torch.zeros(2, 3), y, 0)
    assert memory.tasks == []


# How a state of tasks 0 (open, 9 seen) and 1 of a memory with per_task=4 can be spoiled, for every policy.
SPOILED: dict[str, tuple[dict[str, Any], str]] = {
    "id": ({"task": torch.ones(1)}, "task must be a number, .* got Tensor"),
    "x": ({"x": "x"}, "x must be a tensor, got str"),
    "meta": ({"y": torch.zeros(4, device="meta")}, "y must be a dense tensor"),
    "sparse": ({"x": torch.eye(4).to_sparse()}, "x must be a dense tensor"),
    "expanded": ({"x": torch.zeros(1).expand(4, 10**12)}, "x must be a dense tensor, got an expanded one of shape"),
    "lengths": ({"y": torch.zeros(3).long()}, "x and y must have the same number of examples, got 4 and 3"),
    "empty": ({"x": torch.zeros(0, 2), "y": torch.zeros(0).long()}, "x must hold at least one example"),
    "scalars": ({"x": torch.zeros(()), "y": torch.zeros(())}, "x must hold at least one example"),
    "too many": ({"x": torch.zeros(5, 2), "y": torch.zeros(5).long()}, "must be an integer between 1 and 4, got 5"),
    "more": ({"more": 1}, "a task of the state must have the keys task, x, y, "),
}
OF_POLICY: dict[str, dict[str, tuple[Any, str]]] = {
    "last": {"next": (4, "next must be an integer between 0 and 3, got 4")},
    "reservoir": {
        "seen": (3, "seen must be an integer between 4 and 9007199254740992, got 3"),
        "seen ": ("many", "seen must be an integer between 4 and 9007199254740992, got 'many'"),
    },
    "class-balanced": {
        "times": ([1, 2, 3, 4], "times must be a dense tensor, got list"),
        "times ": (torch.arange(3), r"times must be 4 integers, got \(3,\), torch.int64"),
        "times  ": (torch.rand(4), r"times must be 4 integers, got \(4,\), torch.float32"),
        "times   ": (torch.tensor([1, 2, 2, 3]), "times must differ and lie between 0 and"),
        "times    ": (torch.tensor([1, 2, -2, 3]), "times must differ and lie between 0 and"),
        "times     ": (torch.tensor([1, 2, 2**62, 3]), "times must differ and lie between 0 and"),
        "y": (torch.rand(4), "y must be the examples' classes"),
    },
    "herding": {
        "open": (1, "open must be True or False, got 1"),
        "y": (torch.rand(4), "y must be the examples' classes"),
    },
}
HOSTILE = [(policy, change, message) for policy in OF_POLICY for change, message in SPOILED.values()]
HOSTILE += [
    (p, {name.strip(): value}, message) for p, cases in OF_POLICY.items() for name, (value, message) in cases.items()
]


@pytest.mark.parametrize(("policy", "change", "message"), HOSTILE)
def test_hostile_states_leave_the_memory(policy: str, change: dict[str, Any], message: str) -> None:
    other, memory = make(policy, per_task=4), make(policy, per_task=4)
    seen_by(other, [(0, 9), (1, 9), (2, 1)])
    seen_by(memory, [(0, 5), (3, 2)])
    before = memory.state_dict()
    state = other.state_dict()
    state["tasks"][1] |= change
    with pytest.raises(ValueError, match=message) as error:
        memory.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert same(memory.state_dict(), before)


@pytest.mark.parametrize("policy", OF_POLICY)
@pytest.mark.parametrize("other", OF_POLICY)
def test_a_state_of_another_policy_or_size(policy: str, other: str) -> None:
    memory, theirs = make(policy, per_task=4), make(other, per_task=4 if policy != other else 5)
    seen_by(theirs, [(0, 3)])
    with pytest.raises(ValueError, match=r"must have the keys|state must be of a memory with per_task = 4, got 5"):
        memory.load_state_dict(theirs.state_dict())
    assert memory.tasks == []


@every_policy
def test_the_hook_takes_every_policy(policy: str) -> None:
    model = nn.Linear(2, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gem = GEM(model, optimizer, memory=make(policy, per_task=6))
    train(model, optimizer, gem, ((*batch(5 * step, 5), step // 4) for step in range(12)))
    assert gem.past_tasks == [0, 1]
    assert gem.last is not None


@pytest.mark.cuda
@every_policy
def test_a_gpu_keeps_the_same_examples(policy: str) -> None:
    here, there = make(policy, total=12), make(policy, total=12)
    for task, first in ((0, 0), (0, 9), (1, 0), (0, 18)):
        x, y = batch(first, 9)
        here.observe(x, y, task)
        there.observe(x.cuda(), y.cuda(), task)
    for task in (0, 1):
        x, y = there.examples(task)
        assert (x.device.type, y.device.type) == ("cuda", "cuda")
        assert torch.equal(x.cpu(), here.examples(task)[0])


def test_the_papers_memory_is_the_default() -> None:
    model = nn.Linear(2, 3)
    assert isinstance(GEM(model, torch.optim.SGD(model.parameters(), lr=0.1)).memory, EpisodicMemory)
