"""Nests: containers with tensors in them, in any depth, and what goes through them.

Containers are dicts and other mappings (Hugging Face's BatchEncoding and ModelOutput), tuples, named tuples, lists and
dataclasses. A plain tensor takes the short way through each function.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Nest: TypeAlias = Any
"""A tensor, `Objects`, or containers of these; None stands for targets that there are none of."""


_MAX_DEPTH = 32


class Objects(Sequence[Any]):
    """Examples that are no tensors, graphs say; a list of them, and what makes a batch of it.

    Args:
        items: the examples, one object each.
        collate_fn: collate_fn(list of examples) -> what the model takes, as a DataLoader's.
    """

    def __init__(self, items: list[Any], collate_fn: Callable[[list[Any]], Any]) -> None:
        self.items = items
        self.collate_fn = collate_fn

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        """One example; of a slice or an int64 tensor those examples, as `Objects`."""
        if isinstance(index, int):
            return self.items[index]
        items = self.items[index] if isinstance(index, slice) else [self.items[i] for i in index.tolist()]
        return Objects(items, self.collate_fn)

    def __setitem__(self, index: slice | Tensor, other: Objects) -> None:
        """Puts as many examples into the places that a slice or an int64 tensor names."""
        places = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        for place, item in zip(places, other.items, strict=True):
            self.items[place] = item

    def collated(self) -> Any:
        """All of them as a batch, put together anew in each call: a model may write into it."""
        return self.collate_fn(list(self.items))


def parts_of(value: Any) -> Mapping[Hashable, Any] | None:
    """What a container holds, by name; None for anything else, and for tensors."""
    if isinstance(value, (Tensor, Objects, PackedSequence)):
        return None
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    return None


def rebuilt(value: Any, parts: dict[Hashable, Any]) -> Any:
    """A container like `value` with other parts under the same names."""
    if isinstance(value, MutableMapping):
        new = copy.copy(value)
        for name, part in parts.items():
            new[name] = part
        return new
    if isinstance(value, Mapping):
        return type(value)(parts)  # type: ignore[call-arg]
    if isinstance(value, (tuple, list)):
        return type(value)(*parts.values()) if hasattr(value, "_fields") else type(value)(parts.values())
    new = copy.copy(value)
    for name, part in parts.items():
        object.__setattr__(new, str(name), part)  # of a frozen dataclass, too
    return new


def map_tensors(function: Callable[..., Any], value: Nest, *others: Any) -> Nest:
    """The same containers, with function(tensor, *what the others have in its place) in the place of each tensor."""
    if isinstance(value, (Tensor, Objects)):
        return function(value, *others)
    parts = parts_of(value)
    if parts is None:
        return value
    theirs = [parts_of(other) or {} for other in others]
    mapped = {name: map_tensors(function, part, *(x[name] for x in theirs)) for name, part in parts.items()}
    return rebuilt(value, mapped)


def tensors(value: Nest) -> list[Any]:
    """The tensors (and `Objects`) of a nest, in the order of its containers."""
    if isinstance(value, (Tensor, Objects)):
        return [value]
    parts = parts_of(value) or {}
    return [x for part in parts.values() for x in tensors(part)]


def leaves(name: str, value: Any, *, named: bool = False, depth: int = 0) -> Iterator[tuple[str, Any, bool]]:
    """All that is no container, with how it is reached, and whether it stands under a name."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{name:.50} must be nested at most {_MAX_DEPTH} deep, got more")
    parts = parts_of(value)
    if parts is None:
        yield name, value, named
        return
    by_name = not isinstance(value, (tuple, list)) or hasattr(value, "_fields")
    for key, part in parts.items():
        yield from leaves(f"{name}[{key!r:.50}]", part, named=by_name, depth=depth + 1)


def structure(value: Nest) -> str:
    """The containers in words, without the tensors: equal for nests that `map_tensors` can take together."""
    if isinstance(value, Tensor):
        return "a tensor"
    parts = parts_of(value)
    if parts is None:
        return "objects" if isinstance(value, Objects) else repr(value)
    kind = "dict" if isinstance(value, Mapping) else type(value).__name__
    return f"{kind}({', '.join(sorted(f'{name}: {structure(part)}' for name, part in parts.items()))})"
