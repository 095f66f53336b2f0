"""States of hook, memory and learners: through a file and back with the same bits, and nothing else gets in."""

import copy
import enum
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from utils.asserts import assert_same_bits
from utils.models import mlp, stream
from utils.states import through_a_file

from gem_fast import AGEM, GEM, EpisodicMemory
from gem_fast.paper.learners import LEARNERS, PRESETS, make_learner
from gem_fast.paper.learners.stream_info import StreamInfo

HYPER = {name: PRESETS["split", name] | {"lr": 0.1} for name in LEARNERS}
HYPER["gem"] |= {"memory_per_task": 8}
HYPER["agem"] |= {"memory_per_task": 8, "memory_batch": 4}
HYPER["icarl"] |= {"memory": 20}


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal, bit by bit."""
    if isinstance(a, Tensor):
        assert_same_bits(a, b)
        return True
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def memory(**options: int) -> EpisodicMemory:
    kept = EpisodicMemory(**(options or {"per_task": 6}))
    for x, y, task in stream(3, batches=2):
        kept.observe(x, y, ("task", task))
    kept.observe(x[:1], y[:1], "a short one")
    return kept


def hook(rule: type[GEM] = GEM) -> GEM:
    model = mlp()
    return rule(model, torch.optim.SGD(model.parameters(), lr=0.1), memory=EpisodicMemory(per_task=6))


def learner(name: str, batches: int = 0, multi_head: bool = False) -> Any:
    torch.manual_seed(0)
    outputs = tuple(range(3 * task, 3 * task + 3) if multi_head else range(3) for task in range(3))
    stream_info = StreamInfo(3, outputs, 9 if multi_head else 3, (6,), "mlp")
    made = make_learner(name, stream_info, torch.device("cpu"), **HYPER[name])
    for x, y, task in list(stream(3))[:batches]:
        made.observe(x, y, task)
    return made


@pytest.mark.parametrize("options", [{"per_task": 6}, {"total": 17}])
def test_memory_through_a_file(options: dict[str, int]) -> None:
    one, two = memory(**options), EpisodicMemory(**options)
    two.load_state_dict(through_a_file(one.state_dict()))
    assert same(one.state_dict(), two.state_dict())
    for x, y, task in stream(4):
        one.observe(x, y, ("task", task))
        two.observe(x, y, ("task", task))
    assert same(one.state_dict(), two.state_dict())


def test_a_state_holds_copies() -> None:
    one, two = memory(), EpisodicMemory(per_task=6)
    state = one.state_dict()
    two.load_state_dict(state)
    kept = copy.deepcopy(state)
    for x, y, _ in stream(1):
        one.observe(x, y, "a short one")
    assert same(state, kept)
    for entry in state["tasks"]:
        entry["x"].zero_()
    assert same(two.state_dict(), kept)


@pytest.mark.parametrize("rule", [GEM, AGEM])
def test_hook_through_a_file(rule: type[GEM]) -> None:
    one, two = hook(rule), hook(rule)
    for x, y, task in stream(3):
        one.observe(x, y, task)
    if rule is AGEM:
        one.constraints()  # draws
    two.load_state_dict(through_a_file(one.state_dict()))
    assert two.past_tasks == one.past_tasks == [0, 1]
    assert same(one.state_dict(), two.state_dict())
    assert same(one.constraints()[0], two.constraints()[0])


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("multi_head", [False, True])
@pytest.mark.parametrize("batches", [0, 1, 7, 9])
def test_learner_through_a_file(name: str, multi_head: bool, batches: int) -> None:
    one, two = learner(name, batches, multi_head), learner(name, 2, multi_head)
    two.load_state_dict(through_a_file(one.state_dict()))
    assert same(one.state_dict(), two.state_dict())
    for x, y, task in list(stream(3))[batches:]:
        one.observe(x, y, task)
        two.observe(x, y, task)
    assert same(one.state_dict(), two.state_dict())
    for task in range(3):
        assert one.predict(x, task).equal(two.predict(x, task))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learners_state_holds_copies(name: str) -> None:
    """What was saved stays as it was, whatever the learner does next."""
    one = learner(name, batches=9)
    state = through_a_file(one.state_dict())
    two = learner(name)
    two.load_state_dict(state)
    kept = copy.deepcopy(state)
    for x, y, task in list(stream(3))[9:]:
        two.observe(x, y, task)
    assert same(state, kept)


class Season(enum.Enum):
    SUMMER = 1


@pytest.mark.parametrize("task", [Season.SUMMER, frozenset(), ("a", Season.SUMMER)])
def test_ids_that_a_file_cannot_hold_are_refused_when_saving(task: Any) -> None:
    gem = hook()
    gem.observe(torch.zeros(1, 6), torch.zeros(1).long(), task)
    for part in (gem, gem.memory):
        with pytest.raises(
            ValueError, match=r"must be a number, string, None or a tuple of these to be kept in a file"
        ):
            part.state_dict()


def nested(depth: int) -> Any:
    return (nested(depth - 1),) if depth else 0


BAD_MEMORIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no dictionary": (lambda s: [s], "state must be a dictionary, got list"),
    "foreign": (lambda s: {"weight": 1}, "state must have the keys per_task, total, tasks, got weight"),
    "empty": (lambda s: {}, "got none"),
    "another size": (lambda s: {**s, "per_task": 7}, "state must be of a memory with per_task = 6, got 7"),
    "a tensor as size": (lambda s: {**s, "per_task": torch.ones(2)}, "with per_task = 6, got tensor"),
    "no list": (lambda s: {**s, "tasks": 3}, "tasks of the state must be a list, got int"),
    "twice": (lambda s: {**s, "tasks": [*s["tasks"], s["tasks"][0]]}, "tasks of the state must differ, got .* twice"),
}
BAD_TASKS: dict[str, tuple[dict[str, Any], str]] = {
    "id": ({"task": torch.ones(1)}, "task must be a number, .* got Tensor"),
    "deep id": ({"task": nested(100)}, "task must be a number, .* got tuple"),
    "x": ({"x": "x"}, "x must be a tensor, got str"),
    "meta": ({"y": torch.zeros(6, device="meta")}, "y must be a dense tensor"),
    "sparse": ({"x": torch.eye(6).to_sparse()}, "x must be a dense tensor"),
    "expanded": ({"x": torch.zeros(1).expand(6, 10**12)}, "x must be a dense tensor, got an expanded one of shape"),
    "lengths": ({"y": torch.zeros(5)}, "x and y must have the same number of examples, got 6 and 5"),
    "no examples": ({"x": torch.zeros(0, 6), "y": torch.zeros(0)}, "x must hold at least one example"),
    "no dimensions": ({"x": torch.zeros(()), "y": torch.zeros(())}, "x must hold at least one example"),
    "too many": ({"x": torch.zeros(7, 6), "y": torch.zeros(7)}, "examples must be an integer between 1 and 6, got 7"),
    "next": ({"next": 6}, "next must be an integer between 0 and 5, got 6"),
    "bool": ({"next": True}, "next must be an integer between 0 and 5, got True"),
    "next of few": ({"x": torch.zeros(2, 6), "y": torch.zeros(2), "next": 1}, "next must be .* between 2 and 2, got 1"),
}
for reason, (change, sentence) in BAD_TASKS.items():
    BAD_MEMORIES[reason] = (
        lambda s, change=change: {**s, "tasks": [s["tasks"][1], {**s["tasks"][0], **change}]},
        sentence,
    )


@pytest.mark.parametrize("reason", BAD_MEMORIES)
def test_bad_states_leave_memory_hook_and_learner(reason: str) -> None:
    spoil, sentence = BAD_MEMORIES[reason]
    bad = spoil(memory().state_dict())
    for rule in (GEM, AGEM):
        gem = hook(rule)
        for x, y, task in stream(2):
            gem.observe(x, y, task)
        before = gem.state_dict()
        with pytest.raises(ValueError, match=sentence) as error:
            gem.memory.load_state_dict(bad)
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=sentence):
            gem.load_state_dict({**before, "current": "new", "memory": bad})
        assert same(gem.state_dict(), before)


SCHEDULE = {"schedule": {"passes": 0, "tasks": []}, "reason": None, "call_per_task": False}


@pytest.mark.parametrize(
    ("rule", "change", "sentence"),
    [
        (GEM, {"more": 1}, "state must have the keys memory, current, engine, generator, descriptors, got"),
        (GEM, {"engine": {}}, "engine must have the keys rows, schedule, reason, call_per_task, got none"),
        (
            GEM,
            {"engine": {"rows": {}, **SCHEDULE}},
            "rows of the state must have the keys refresh_every, G, past, depends, step, got none",
        ),
        (
            GEM,
            {"engine": {"rows": {"refresh_every": 2, "G": None, "past": [], "depends": [], "step": 0}, **SCHEDULE}},
            "state must be of an engine with refresh_every = 1, got 2",
        ),
        (AGEM, {"generator": {"cpu": torch.zeros(3)}}, r"generator must be the state of a torch\.Generator on the CPU"),
        (AGEM, {"generator": {}}, "generator must be the state"),
        (AGEM, {"generator": "seed"}, "generator must be a dictionary of states by device, got str"),
        (AGEM, {"current": []}, "current must be a number, string, None or a tuple"),
    ],
)
def test_bad_hook_states(rule: type[GEM], change: dict[str, Any], sentence: str) -> None:
    gem, other = hook(rule), hook(rule)
    for x, y, task in stream(2):
        gem.observe(x, y, task)
    before = gem.state_dict()
    with pytest.raises(ValueError, match=sentence):
        gem.load_state_dict({**other.state_dict(), **change})
    assert same(gem.state_dict(), before)
