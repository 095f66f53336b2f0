"""Batches of every kind of container, whose values say which examples they are."""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor


class Pair(NamedTuple):
    """A named tuple of two."""

    first: Any
    second: Any


@dataclasses.dataclass(frozen=True)
class Record:
    """A dataclass of two."""

    data: Any
    extra: Any = None


class Fields(collections.UserDict[Any, Any]):
    """A mapping that is no dict."""


Template = Callable[[Tensor], Any]
"""template(numbers of examples) -> a nest of tensors for these."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)


@functools.cache
def leaf(shape: tuple[int, ...], dtype: torch.dtype, salt: int) -> Template:
    """Tensors (n, *shape)."""

    def fill(numbers: Tensor) -> Tensor:
        count = torch.tensor(shape, dtype=torch.int64).prod()
        values = (numbers[:, None] * 7 + torch.arange(int(count)) * 3 + salt) % 29
        return values.reshape(len(numbers), *shape).to(dtype)

    return fill


LEAVES = st.builds(leaf, st.lists(st.integers(0, 3), max_size=3).map(tuple), st.sampled_from(DTYPES), st.integers(0, 9))


def _container(make: Callable[[list[Any]], Any]) -> Callable[[list[Template]], Template]:
    return lambda parts: lambda numbers: make([part(numbers) for part in parts])


def _named(parts: list[Any]) -> dict[str, Any]:
    return {f"field {i}": part for i, part in enumerate(parts)}


def plain_containers(parts: st.SearchStrategy[Template]) -> st.SearchStrategy[Template]:
    several = st.lists(parts, min_size=1, max_size=3)
    return st.one_of(
        several.map(_container(_named)),
        several.map(_container(lambda values: {**_named(values), "constant": 0.5, "none": None, "name": "x"})),
        several.map(_container(lambda values: Fields(_named(values)))),
        several.map(_container(lambda values: collections.OrderedDict(_named(values)))),
        several.map(_container(tuple)),
        several.map(_container(lambda values: [None, *values])),
    )


def containers(parts: st.SearchStrategy[Template]) -> st.SearchStrategy[Template]:
    pairs = st.lists(parts, min_size=2, max_size=2)
    return st.one_of(
        plain_containers(parts),
        pairs.map(_container(lambda values: Record(*values))),
        pairs.map(_container(lambda values: Pair(*values))),
    )


NESTS = st.recursive(LEAVES, containers, max_leaves=5)
# What a memory keeps as dicts, tuples and lists.
PLAIN_NESTS = st.recursive(LEAVES, plain_containers, max_leaves=5)


def same(a: Any, b: Any) -> bool:
    """Whether two nests have the same types and values throughout."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b))
    if isinstance(a, collections.abc.Mapping):
        return set(a) == set(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def as_kept(value: Any) -> Any:
    """What a memory makes of a nest: dicts for mappings."""
    if isinstance(value, collections.abc.Mapping):
        return {name: as_kept(part) for name, part in value.items()}
    if isinstance(value, Pair):
        return Pair(*map(as_kept, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(as_kept, value))
    return Record(as_kept(value.data), as_kept(value.extra)) if isinstance(value, Record) else value
