"""Memories of nests, of examples of different lengths and of objects keep what those of plain tensors keep."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from utils.memory_streams import BATCHES, SIZES, batch, make, numbers, seen_by, through_a_file
from utils.nests import NESTS, PLAIN_NESTS, Pair, Record, Template, as_kept, same

from gem_fast import GEM, MEMORY_POLICIES, EpisodicMemory, HerdingMemory
from gem_fast.batches import size_of
from gem_fast.containers import Objects, tensors

every_policy = pytest.mark.parametrize("policy", MEMORY_POLICIES)
some = settings(max_examples=15)


def features(policy: str, of: Any) -> dict[str, Any]:
    return {"feature_fn": of} if policy == "herding" else {}


def seen_of(batches: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Of each mini-batch the task, the number of its first example and how many there are."""
    seen: dict[int, int] = {}
    found = []
    for task, n in batches:
        found.append((task, seen.get(task, 0), n))
        seen[task] = seen.get(task, 0) + n
    return found


@every_policy
@some
@given(sizes=SIZES, batches=BATCHES, template=NESTS, middle=st.integers(0, 12))
def test_the_same_examples_of_any_nest(policy, sizes, batches, template: Template, middle: int) -> None:
    """Through a state, too, which holds plain containers."""

    def new() -> Any:
        return make(policy, **sizes, **features(policy, lambda x: x["plain"]))

    plain, memory = make(policy, **sizes), new()
    for step, (task, first, n) in enumerate(seen_of(batches)):
        x, y = batch(first, n)
        plain.observe(x, y, task)
        memory.observe({"nest": template(x[:, 0].long()), "plain": x}, y, task)
        if step == middle:
            with torch.serialization.safe_globals([Pair, Record]):
                state = through_a_file(memory.state_dict())
            memory = new()
            memory.load_state_dict(state)
    for task in plain.tasks:
        kept = torch.tensor(numbers(plain, task))
        x, y = memory.examples(task)
        assert same(x, as_kept({"nest": template(kept), "plain": plain.examples(task)[0]}))
        assert torch.equal(y, plain.examples(task)[1])


@pytest.mark.parametrize("policy", ["last", "reservoir"])
@some
@given(sizes=SIZES, batches=BATCHES, template=st.one_of(st.none(), NESTS))
def test_any_targets_or_none(policy, sizes, batches, template: Template | None) -> None:
    plain, memory = make(policy, **sizes), make(policy, **sizes)
    for task, first, n in seen_of(batches):
        x, y = batch(first, n)
        plain.observe(x, y, task)
        memory.observe(x, template and template(x[:, 0].long()), task)
    twin = make(policy, **sizes)
    with torch.serialization.safe_globals([Pair, Record]):
        twin.load_state_dict(through_a_file(memory.state_dict()))
    for task in plain.tasks:
        kept = torch.tensor(numbers(plain, task))
        for x, y in (memory.examples(task), twin.examples(task)):
            assert torch.equal(x[:, 0].long(), kept)
            assert same(y, template and as_kept(template(kept)))


@every_policy
@some
@given(template=PLAIN_NESTS)
def test_states_of_plain_containers_need_no_class(policy: str, template: Template) -> None:
    memory = make(policy, per_task=3, **features(policy, lambda x: torch.ones(size_of(x), 1)))
    memory.observe(template(torch.arange(5)), torch.arange(5), "a")
    through_a_file(memory.state_dict())


@pytest.mark.parametrize("policy", ["class-balanced", "herding"])
@pytest.mark.parametrize(("y", "got"), [(None, "None"), ({"label": torch.zeros(2).long()}, "dict")])
def test_targets_without_classes(policy: str, y: Any, got: str) -> None:
    memory = make(policy, per_task=5)
    with pytest.raises(ValueError, match=rf"y must be the examples' classes, integers of shape \(n,\), got {got}$"):
        memory.observe(torch.zeros(2, 3), y, 0)
    assert memory.tasks == []


def test_features_of_a_nest() -> None:
    memory = HerdingMemory(per_task=2)
    with pytest.raises(ValueError, match="feature_fn must be given where x is no tensor, got x of type dict"):
        memory.observe({"a": torch.zeros(2, 3)}, torch.zeros(2).long(), 0)
    assert memory.tasks == []


@every_policy
@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({"a": torch.zeros(2, 3)}, r"x must have the structure of the task's earlier examples, dict\(a: .*, got dict"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(2, 1)}, r"structure of .*, got dict\(a: a tensor, b: a tensor\)"),
        (
            {"a": torch.zeros(2, 3), "b": (torch.zeros(2, 2), None)},
            r"x\['b'\]\[0\] must have the shape, .* pad= of the",
        ),
        ({"a": torch.zeros(2, 3).int(), "b": (torch.zeros(2, 1), None)}, r"x\['a'\] must .*, got \(n, 3\) torch.int32"),
        (torch.zeros(2, 3), "x must have the structure of .*, got a tensor$"),
    ],
    ids=str,
)
def test_nests_that_do_not_fit_leave_the_memory(policy: str, x: Any, message: str) -> None:
    memory = make(policy, per_task=3, **features(policy, lambda x: x["a"]))
    first = {"a": torch.ones(2, 3), "b": (torch.ones(2, 1), None)}
    memory.observe(first, torch.zeros(2).long(), 0)
    with pytest.raises((ValueError, TypeError), match=message):
        memory.observe(x, torch.zeros(2).long(), 0)
    assert same(memory.examples(0)[0], first)


# ---- lengths ---------------------------------------------------------------------------------------------------------


@every_policy
@some
@given(sizes=SIZES, batches=BATCHES, data=st.data())
def test_lengths_are_padded_to_the_longest(policy, sizes, batches, data: st.DataObject) -> None:
    pad = {"ids": 99, "x": 0}
    of_number = functools.partial(make, policy, **sizes, **features(policy, lambda x: x["plain"]))
    plain, memory = make(policy, **sizes), of_number(pad=pad)
    lengths: dict[tuple[int, int], int] = {}
    for task, first, n in seen_of(batches):
        x, y = batch(first, n)
        length = data.draw(st.integers(0, 4))
        lengths |= {(task, number): length for number in range(first, first + n)}
        plain.observe(x, y, task)
        ids = x[:, :1].long().expand(n, length)
        memory.observe({"nest": {"ids": ids}, "plain": x, "mask": torch.ones(n, length)}, y, task)
        twin = of_number(pad=pad)
        twin.load_state_dict(through_a_file(memory.state_dict()))
        memory = twin
    for task in plain.tasks:
        kept = numbers(plain, task)
        x, _ = memory.examples(task)
        assert x["plain"][:, 0].tolist() == kept
        width = x["mask"].shape[1]
        assert width >= max(lengths[task, number] for number in kept)
        for row, number in enumerate(kept):
            length = lengths[task, number]
            assert x["nest"]["ids"][row].tolist() == [number] * length + [99] * (width - length)
            assert x["mask"][row].tolist() == [1.0] * length + [0.0] * (width - length)


@pytest.mark.parametrize("pad", ["0", {"ids": [0]}, torch.zeros(1)])
def test_bad_padding(pad: Any) -> None:
    with pytest.raises(TypeError, match="pad must be a number, or numbers by the names of tensors, got "):
        EpisodicMemory(per_task=1, pad=pad)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@every_policy
@some
@given(batches=BATCHES)
def test_all_keeps_every_example(policy: str, batches: list[tuple[int, int]]) -> None:
    memory = make(policy, per_task="all")
    seen = seen_by(memory, batches)
    twin = make(policy, per_task="all")
    twin.load_state_dict(through_a_file(memory.state_dict()))
    for task, n in seen.items():
        assert sorted(numbers(memory, task)) == list(range(n))
        assert numbers(memory, task) == numbers(twin, task)
    assert repr(memory).startswith(f"{type(memory).__name__}(per_task='all')")


@every_policy
@pytest.mark.parametrize("size", [{"per_task": "all"}, {"per_task": 10**12}, {"total": 10**12}], ids=str)
def test_buffers_grow_with_what_comes(policy: str, size: dict[str, Any]) -> None:
    memory = make(policy, **size)
    places = set()
    for step in range(200):
        memory.observe(*batch(3 * step, 3), 0)
        places.add(memory._buffers[0].x.data_ptr())
    assert len(places) <= 10  # 3, 6, 12, ... 768
    x, _ = memory.examples(0)
    assert (len(x), x.untyped_storage().nbytes()) <= (600, 2 * 600 * x[0].nbytes)


def test_no_other_word_than_all() -> None:
    for options in ({"per_task": "everything"}, {"total": "all"}):
        with pytest.raises(TypeError, match="must be an integer, got str"):
            EpisodicMemory(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='candidates must be None where per_task is "all", got 5'):
        HerdingMemory(per_task="all", candidates=5)


# ---- ids and modes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "plain"),
    [
        (np.int64(3), 3),
        (np.float64(0.5), 0.5),
        (np.str_("a"), "a"),
        (np.bool_(True), True),
        ((np.int32(1), ("b", np.uint8(2))), (1, ("b", 2))),
        (np.unique([2, 0, 1])[0], 0),
    ],
    ids=str,
)
@every_policy
def test_ids_of_numpy_are_kept_as_pythons(policy: str, task: Any, plain: Any) -> None:
    model = torch.nn.Linear(2, 3).double()
    gem = GEM(model, torch.optim.SGD(model.parameters(), lr=0.1), memory=make(policy, per_task=4))
    gem.observe(*batch(0, 2), task)
    [kept] = gem.memory.tasks
    assert (type(kept), kept) == (type(plain), plain)
    assert repr(gem.memory.tasks) == repr([plain])
    through_a_file(gem.state_dict())
    gem.observe(*batch(2, 2), plain)
    assert gem.memory.tasks == [plain]
    assert gem.past_tasks == []
    gem.current_task = task
    assert (type(gem.current_task), gem.past_tasks) == (type(plain), [])
    assert len(gem.memory.examples(task)[0]) == 4


@every_policy
def test_what_is_observed_in_inference_mode_is_an_ordinary_tensor(policy: str) -> None:
    memory, expected = make(policy, total=4), make(policy, total=4)
    for task, first, n in seen_of([(0, 3), (0, 6), (1, 2), (0, 1)]):
        for seen, inference in ((memory, first != 3), (expected, False)):
            with torch.inference_mode(inference):
                seen.observe(*batch(first, n), task)
        with torch.inference_mode():
            memory.examples(task)
    for task in (0, 1):
        assert not any(x.is_inference() for x in memory.examples(task))
        assert numbers(memory, task) == numbers(expected, task)
    with torch.inference_mode():
        memory.load_state_dict(expected.state_dict())
    memory.observe(*batch(8, 2), 0)
    assert not any(x.is_inference() for x in memory.examples(0))


# ---- objects ---------------------------------------------------------------------------------------------------------


class Graph:
    """An example that is no tensor: numbers of its nodes."""

    def __init__(self, nodes: Tensor) -> None:
        self.nodes = nodes

    def clone(self) -> "Graph":
        return Graph(self.nodes.clone())

    def to(self, device: Any) -> "Graph":
        return Graph(self.nodes.to(device))


def collate(graphs: list[Graph]) -> Tensor:
    return torch.stack([graph.nodes.sum() for graph in graphs])[:, None]


@every_policy
@some
@given(sizes=SIZES, batches=BATCHES)
def test_objects_are_kept_as_the_same_numbers_of_examples(policy, sizes, batches) -> None:
    def new() -> Any:
        return make(policy, **sizes, collate_fn=collate, **features(policy, lambda x: torch.cat([x, x * 7 % 11], 1)))

    plain, memory = make(policy, **sizes), new()
    for task, first, n in seen_of(batches):
        x, y = batch(first, n)
        graphs = [Graph(F.one_hot(number.long(), 200) * number) for number in x[:, 0]]
        plain.observe(x, y, task)
        memory.observe(graphs, y, task)
        for graph in graphs:
            graph.nodes.zero_()  # copies are kept
    twin = new()
    state = memory.state_dict()
    assert all(isinstance(entry["x"], list) for entry in state["tasks"])
    twin.load_state_dict(state)
    for task in plain.tasks:
        kept = numbers(plain, task)
        for x, y in (memory.examples(task), twin.examples(task)):
            assert isinstance(x, Objects)
            assert x.collated().flatten().tolist() == kept
            assert torch.equal(y, plain.examples(task)[1])
    memory.to(device="cpu", dtype=torch.float32)
    assert [graph.nodes.dtype for graph in memory.examples(plain.tasks[0])[0]][:1] == [torch.float64]


def test_objects_of_plain_tensors_go_through_a_file() -> None:
    images = [torch.ones(1, size, size) for size in (2, 3, 4)]
    memory = EpisodicMemory(per_task=2, collate_fn=list)
    memory.observe(images, None, 0)
    twin = EpisodicMemory(per_task=2, collate_fn=list)
    twin.load_state_dict(through_a_file(memory.state_dict()))
    assert same(twin.examples(0)[0].collated(), images[1:])


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 3), {"a": torch.zeros(2, 3)}, Graph(torch.zeros(2))], ids=["tensor", "dict", "object"]
)
def test_objects_come_as_a_list(x: Any) -> None:
    memory = EpisodicMemory(per_task=2, collate_fn=collate)
    with pytest.raises(TypeError, match="x must be a list of examples, which collate_fn puts together, got "):
        memory.observe(x, torch.zeros(2), 0)
    with pytest.raises(ValueError, match="x and y must have the same number of examples, got 1 and 2"):
        memory.observe([Graph(torch.zeros(2))], torch.zeros(2), 0)
    assert memory.tasks == []


HOSTILE_NESTS: dict[str, tuple[Any, str]] = {
    "a class": ({"a": object()}, r"x\['a'\] must be a tensor, got object"),
    "sparse": ([torch.eye(4).to_sparse()], r"x\[0\] must be a dense tensor, got Tensor"),
    "expanded": ((torch.zeros(1).expand(4, 10**12),), r"x\[0\] must be a dense tensor, got an expanded one"),
    "lengths": ({"a": torch.zeros(4), "b": torch.zeros(3)}, r"x\['a'\] and x\['b'\] must have the same number"),
    "none": (None, "x must be a tensor, got NoneType"),
    "deep": (functools.reduce(lambda inner, _: [inner], range(5000), torch.zeros(4)), "nested at most 32 deep"),
}


@every_policy
@pytest.mark.parametrize("kind", HOSTILE_NESTS)
def test_hostile_nests_leave_the_memory(policy: str, kind: str) -> None:
    memory = make(policy, per_task=4, **features(policy, lambda x: tensors(x)[0]))
    seen_by(memory, [(0, 4), (1, 4)])
    state = memory.state_dict()
    value, message = HOSTILE_NESTS[kind]
    state["tasks"][1]["x"] = value
    with pytest.raises(ValueError, match=message) as error:
        memory.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert numbers(memory, 1) == numbers(memory, 0)
