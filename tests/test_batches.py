"""Nests of tensors: counted, selected, cut, joined and padded like one tensor."""

import collections
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from utils.nests import NESTS, Fields, Pair, Record, Template, as_kept, same

from gem_fast import batches
from gem_fast.batches import DoNotFit, check_examples, concatenate, select, split
from gem_fast.containers import Objects, tensors

quick = settings(max_examples=60)


@quick
@given(template=NESTS, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_joined_and_cut(template: Template, sizes: list[int], data: st.DataObject) -> None:
    numbers = torch.arange(sum(sizes))
    whole, parts = template(numbers), [template(mine) for mine in numbers.split(sizes)]
    check_examples(whole, whole)
    assert batches.size_of(whole) == len(numbers)
    assert same(concatenate("x", parts), whole)
    cut = split(whole, sizes)
    assert cut is not None
    assert all(map(same, cut, parts))
    index = torch.tensor(data.draw(st.lists(st.integers(0, len(numbers) - 1), max_size=5)), dtype=torch.int64)
    assert same(select(whole, index), template(numbers[index]))
    assert same(select(whole, slice(1, 3)), template(numbers[1:3]))


@quick
@given(template=NESTS)
def test_copies_share_nothing_and_views_do(template: Template) -> None:
    value = template(torch.arange(4))
    where = [x.data_ptr() for x in tensors(value) if x.numel()]
    assert same(batches.clone(value), value)
    assert not {x.data_ptr() for x in tensors(batches.clone(value)) if x.numel()} & set(where)
    assert [x.data_ptr() for x in tensors(select(value, slice(0, 2))) if x.numel()] == where
    assert same(batches.stored(value), as_kept(value))
    assert [x.data_ptr() for x in tensors(batches.stored(value)) if x.numel()] == where


@quick
@given(template=NESTS)
def test_written_and_moved(template: Template) -> None:
    kept = batches.empty(template(torch.arange(2)), 5)
    batches.write(kept, slice(0, 5), template(torch.arange(5)))
    batches.write(kept, torch.tensor([3, 0]), template(torch.tensor([8, 9])))
    assert same(kept, template(torch.tensor([9, 1, 2, 8, 4])))
    wide = batches.moved(kept, None, torch.float64)
    for before, after in zip(tensors(kept), tensors(wide), strict=True):
        assert after.dtype == (torch.float64 if before.is_floating_point() else before.dtype)
        assert torch.equal(before.to(after.dtype), after)


@quick
@given(one=NESTS, two=NESTS)
def test_structures_that_differ_do_not_fit(one: Template, two: Template) -> None:
    first, second = as_kept(one(torch.arange(3))), as_kept(two(torch.arange(2)))
    nothing = slice(0, 0)
    if same(select(first, nothing), select(second, nothing)):
        assert batches.size_of(concatenate("x", [first, second])) == 5
    else:
        with pytest.raises(DoNotFit, match=r"^x.* must have the s.* of the other tasks' examples, .* got "):
            concatenate("x", [first, second])


# What x = {"ids": (n, length), "deep": {"ids": (n, length)}, "pair": ((n,), (n, length))} is padded with; None: not.
PADS: list[tuple[Any, tuple[Any, Any, Any]]] = [
    (9, (9, 9, 9)),
    ({"x": 1, "ids": 9}, (9, 9, 1)),
    ({"ids": 9, "pair": 2}, (9, 9, 2)),
    ({"ids": 9, "deep": {"ids": 8}, "pair": {1: 7}}, (9, 8, 7)),
    ({"x": {"ids": 9, 1: 7}, "y": 3}, (9, 9, 7)),
    ({"x": {"deep": {"ids": 9}}, 1: 7}, (None, 9, 7)),
    (None, (None, None, None)),
]


@pytest.mark.parametrize(("pad", "numbers"), PADS, ids=str)
@settings(max_examples=15)
@given(sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 5)), min_size=1, max_size=4))
def test_padding_is_on_the_right_and_by_name(pad: Any, numbers: tuple[Any, ...], sizes: list[tuple[int, int]]) -> None:
    def make(n: int, length: int) -> Any:
        ids = torch.arange(n * length).reshape(n, length)
        return {"ids": ids, "deep": {"ids": -ids}, "pair": (ids.sum(1), ids.double())}

    values = [make(*size) for size in sizes]
    longest = max(length for _, length in sizes)
    if None in numbers and len({length for _, length in sizes}) > 1:
        with pytest.raises(DoNotFit, match=r"x\['ids'\] must have .*; pad= of the memory takes different lengths$"):
            concatenate("x", values, pad)
        return
    got = concatenate("x", values, pad)
    assert torch.equal(got["pair"][0], torch.cat([value["pair"][0] for value in values]))
    for number, (key, *rest) in zip(numbers, (("ids",), ("deep", "ids"), ("pair", 1)), strict=True):
        parts = [value[key][rest[0]] if rest else value[key] for value in values]
        right = [F.pad(part, (0, longest - part.shape[1]), value=number or 0) for part in parts]
        assert same(got[key][rest[0]] if rest else got[key], torch.cat(right))


@pytest.mark.parametrize(
    ("dtype", "pad"),
    [(torch.int64, 0.5), (torch.uint8, -100), (torch.uint8, 256), (torch.bool, 2), (torch.int32, float("nan"))],
    ids=str,
)
def test_padding_that_the_dtype_cannot_hold(dtype: torch.dtype, pad: float) -> None:
    ids = torch.ones(2, 3).to(dtype)
    with pytest.raises(ValueError, match=rf"pad must be a number that x\['ids'\] of {dtype} can hold, got {pad}"):
        concatenate("x", [{"ids": ids}, {"ids": ids[:, :2]}], {"ids": pad})


def test_what_is_not_one_per_example_is_passed_as_it_is() -> None:
    output = {"logits": torch.arange(5.0), "loss": torch.tensor(1.0), "weights": torch.ones(3), "cache": object()}
    first, second = split(output, [2, 3]) or []
    assert (first["logits"].tolist(), second["logits"].tolist()) == ([0, 1], [2, 3, 4])
    assert all(first[name] is second[name] is output[name] for name in ("loss", "weights", "cache"))
    assert split({"loss": torch.tensor(1.0)}, [2, 3]) is None
    assert split(torch.tensor(1.0), [1]) is None
    assert split(object(), [1]) is None


def test_hugging_face_containers() -> None:
    from transformers import BatchEncoding
    from transformers.modeling_outputs import CausalLMOutput

    output = CausalLMOutput(logits=torch.arange(5.0), hidden_states=(torch.ones(5, 2), torch.zeros(5, 2)))
    first, second = split(output, [2, 3]) or []
    assert type(first) is type(output)
    assert (first.logits.tolist(), second["logits"].tolist()) == ([0, 1], [2, 3, 4])
    assert [len(states) for states in second.hidden_states] == [3, 3]
    assert output.logits.tolist() == [0, 1, 2, 3, 4]
    encoding = BatchEncoding({"input_ids": torch.ones(2, 3).long()})
    assert same(batches.stored(encoding), {"input_ids": torch.ones(2, 3).long()})
    kept = batches.stored(CausalLMOutput(logits=torch.ones(2, requires_grad=True)))
    assert not kept.logits.requires_grad


X = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        ({"a": X, "b": X[:2]}, None, ValueError, r"x\['a'\] and x\['b'\] must have the same number .* got 3 and 2"),
        ((X,), {"c": [X[1:]]}, ValueError, r"x\[0\] and y\['c'\]\[0\] must have the same number .*, got 3 and 2"),
        (Record(X, 3 * [X[:0]]), X, ValueError, r"x\['extra'\]\[0\] must hold at least one .* got shape \(0, 2\)"),
        (Pair(X, torch.tensor(1)), X, ValueError, r"x\['second'\] must hold at least one example, got shape \(\)"),
        ({"a": None}, None, ValueError, "x must hold at least one example, got no tensor"),
        (X, {}, ValueError, "y must hold at least one example, got no tensor"),
        (None, X, TypeError, "x must be a tensor, got NoneType"),
        ("text", X, TypeError, "x must be a tensor, got str"),
        ({"a": ["one", "two"]}, X, TypeError, r"x\['a'\]\[0\] must be a tensor, got str"),
        ((X, 0.5), None, TypeError, r"x\[1\] must be a tensor, got float"),
        ({"a": X.numpy()}, X, TypeError, r"x\['a'\] must be a tensor, got ndarray; a memory with collate_fn= keeps"),
        ([object()], X, TypeError, r"x\[0\] must be a tensor, got object; a memory with collate_fn= keeps a list"),
        (pack_sequence([X[0], X[1]]), X, TypeError, "x must be a tensor, got PackedSequence$"),
        (Fields(a=X.to_sparse()), X, TypeError, r"x\['a'\] must be a dense tensor, got a sparse one"),
        (Objects([], list), None, ValueError, "x must hold at least one example, got none"),
    ],
)
def test_what_is_no_batch(x: Any, y: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        check_examples(x, y)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_with_what_to_do(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)], layout=layout)
    with pytest.raises(
        TypeError, match=r"x\['a'\] must be a dense tensor, got a nested one: .*to_padded_tensor .* pad="
    ):
        check_examples({"a": nested})


@pytest.mark.parametrize("kind", [list, dict])
def test_a_nest_has_an_end(kind: type) -> None:
    endless: Any = kind()
    if kind is list:
        endless.append(endless)
    else:
        endless["a"] = endless
    with pytest.raises(ValueError, match="must be nested at most 32 deep, got more"):
        check_examples(endless)


def test_objects_are_copied_as_a_whole() -> None:
    whole = torch.arange(1000.0)
    kept = batches.clone(
        Objects([whole[:2], {"a": whole[2:3]}, Pair(whole[3:5], "name"), collections.deque([1])], list)
    )
    assert [x.untyped_storage().nbytes() for x in (kept[0], kept[1]["a"], kept[2].first)] == [8, 4, 8]
    assert kept[2].second == "name"
    assert kept.collated()[3] == collections.deque([1])
    joined: Any = concatenate("x", [kept, kept[torch.tensor([1])]])
    assert len(joined) == 5
    assert isinstance(joined[4]["a"], Tensor)
