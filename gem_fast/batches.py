"""What an example is: x, y and a model's output are a tensor, or a nest of containers with tensors in it.

The first dimension of every tensor of a batch runs over the same n examples. Whoever counts, selects, concatenates,
pads or moves examples does it here, and a plain tensor takes the short way through each function.
"""

from __future__ import annotations

import copy
import dataclasses
import numbers
from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gem_fast.containers import Nest, Objects, leaves, map_tensors, parts_of, rebuilt, structure, tensors

Pad: TypeAlias = "float | Mapping[Hashable, Pad] | None"
"""What shorter examples are padded with: a number, or numbers by name. A tensor takes the value of its own name, else
that of the container it is in; x and y are the outermost names, and the names of a tuple are 0, 1, ... A mapping in the
place of a number has names that count within that container only."""

# What may stand beside tensors under a name, the same for all examples of a task.
CONSTANTS = (bool, int, float, str, type(None))


def check_examples(x: Nest, y: Nest = None) -> None:
    """Raises unless x and y hold the same, positive number of examples.

    Args:
        x: a dense tensor (n, ...) or a nest of these; beside them, constants in mappings, dataclasses and named tuples.
        y: likewise, or None where the loss needs none.

    Raises:
        TypeError: there is something else than dense tensors.
        ValueError: the tensors differ in length, are empty, or there are none.
    """
    if isinstance(x, Tensor) and isinstance(y, Tensor) and _checked_length("x", x) == _checked_length("y", y):
        return
    found: list[tuple[str, int]] = []
    for root, value in (("x", x), ("y", y)):
        if root == "y" and y is None:
            continue
        n_before = len(found)
        for name, leaf, is_named in leaves(root, value):
            is_constant = isinstance(leaf, CONSTANTS) if is_named else leaf is None and name != root
            if not is_constant:
                found.append((name, _checked_length(name, leaf)))
        if len(found) == n_before:
            raise ValueError(f"{root} must hold at least one example, got no tensor")
    first, n = found[0]
    for name, length in found:
        if length != n:
            raise ValueError(f"{first} and {name} must have the same number of examples, got {n} and {length}")


def _checked_length(name: str, leaf: Any) -> int:
    """The number of examples in a dense tensor, or in `Objects`; raises where it is anything else, or empty."""
    if isinstance(leaf, Tensor):
        if leaf.is_nested:
            raise TypeError(
                f"{name} must be a dense tensor, got a nested one: torch.nested.to_padded_tensor makes it one, and the "
                "memory's pad= takes batches of different lengths"
            )
        if leaf.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got a sparse one of layout {leaf.layout}")
        if leaf.dim() == 0 or leaf.shape[0] == 0:
            raise ValueError(f"{name} must hold at least one example, got shape {tuple(leaf.shape)}")
        return leaf.shape[0]  # len(leaf) takes ten times as long
    if not isinstance(leaf, Objects):
        raise TypeError(f"{name} must be a tensor, got {type(leaf).__name__}{_hint(leaf)}")
    if not leaf:
        raise ValueError(f"{name} must hold at least one example, got none")
    return len(leaf)


def _hint(leaf: Any) -> str:
    if isinstance(leaf, (*CONSTANTS, PackedSequence)):
        return ""
    return "; a memory with collate_fn= keeps a list of examples that are no tensors"


def size_of(x: Nest) -> int:
    """n, the number of examples."""
    first = x if isinstance(x, Tensor) else tensors(x)[0]
    return first.shape[0] if isinstance(first, Tensor) else len(first)


def versions(x: Nest) -> Any:
    """What differs once a tensor was changed in place."""
    return x._version if isinstance(x, Tensor) else [tensor._version for tensor in tensors(x)]


def stored(value: Nest) -> Nest:
    """As a memory keeps it: without a history, and every mapping that is no dataclass as a plain dict."""
    if isinstance(value, Tensor):
        return value.detach()
    parts = parts_of(value)
    if parts is None:
        return value
    parts = {name: stored(part) for name, part in parts.items()}
    return parts if isinstance(value, Mapping) and not dataclasses.is_dataclass(value) else rebuilt(value, parts)


def select(value: Nest, index: slice | Tensor) -> Nest:
    """Some of the examples: of a slice views, of an int64 tensor of positions copies."""
    if isinstance(value, Tensor):
        return value[index] if isinstance(index, slice) else value.index_select(0, _beside(index, value))
    return map_tensors(lambda x: select(x, index) if isinstance(x, Tensor) else x[index], value)


def write(value: Nest, index: slice | Tensor, new: Nest) -> None:
    """Overwrites some of the examples with copies of others, which are as many and of the same shape."""
    if isinstance(value, Tensor):
        value[_beside(index, value) if isinstance(index, Tensor) else index] = new
    elif isinstance(value, Objects):
        value[index] = new
    else:
        map_tensors(lambda x, theirs: write(x, index, theirs), value, new)


def _beside(index: Tensor, x: Tensor) -> Tensor:
    """Positions on the device of what they are of: what reads them is enqueued after the copy, so nothing waits."""
    return index.to(x.device, non_blocking=index.device.type == "cpu")


def device_of(value: Nest) -> torch.device:
    """Where the first tensor of a nest is; the CPU where it holds none."""
    return next((x.device for x in tensors(value) if isinstance(x, Tensor)), torch.device("cpu"))


def empty(value: Nest, n: int) -> Nest:
    """Room for n examples like those of `value`."""

    def empty_one(x: Any) -> Any:
        return x.new_empty((n, *x.shape[1:])) if isinstance(x, Tensor) else Objects([None] * n, x.collate_fn)

    return map_tensors(empty_one, value)


def clone(value: Nest) -> Nest:
    """The same with copies of all tensors and objects."""
    return map_tensors(_copied, value)


def moved(value: Nest, device: torch.device | str | None, dtype: torch.dtype | None) -> Nest:
    """The examples on a device (None: where they are), floating-point tensors with a dtype (None: their own)."""

    def move_one(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None)
        can_move = device is not None and hasattr(x, "to")
        return x.to(device) if can_move else x

    def move(x: Any) -> Any:
        return Objects([move_one(item) for item in x.items], x.collate_fn) if isinstance(x, Objects) else move_one(x)

    return map_tensors(move, value)


def _copied(x: Any) -> Any:
    """A copy that shares no memory: deepcopy of a view would copy all that it is a view of."""
    if isinstance(x, Objects):
        return Objects([_copied(item) for item in x.items], x.collate_fn)
    if parts_of(x) is not None:
        return rebuilt(x, {name: _copied(part) for name, part in (parts_of(x) or {}).items()})
    return x.clone() if hasattr(x, "clone") else copy.deepcopy(x)


# ---- several batches -------------------------------------------------------------------------------------------------


def check_pad(pad: Any) -> None:
    """Raises TypeError unless `pad` is None, a number, or a mapping of names to these."""
    if isinstance(pad, Mapping):
        for value in pad.values():
            check_pad(value)
    elif pad is not None and not isinstance(pad, numbers.Real):
        raise TypeError(f"pad must be a number, or numbers by the names of tensors, got {type(pad).__name__}")


class DoNotFit(ValueError):
    """Batches that cannot be one; the message says why."""


def fit(name: str, kept: Nest, new: Nest, pad: Pad, whose: str) -> None:
    """Raises `DoNotFit` unless both can be in one batch, `new` or `kept` padded where `pad` says with what.

    Args:
        name: "x" or "y".
        kept: the examples that came before.
        new: further ones.
        pad: of the memory.
        whose: what those before are called in the error.
    """
    if isinstance(kept, Tensor) and isinstance(new, Tensor):
        if kept.shape[1:] == new.shape[1:] and kept.dtype == new.dtype and kept.device == new.device:
            return
        _fit_tensors(name, kept, new, _pad_values(name, kept, pad), whose)
        return
    if structure(kept) != structure(new):
        raise DoNotFit(f"{name} must have the structure of {whose}, {structure(kept):.200}, got {structure(new):.200}")
    map_tensors(
        lambda one, two, value, path: _fit_tensors(path, one, two, value, whose),
        kept,
        new,
        _pad_values(name, kept, pad),
        _paths(name, kept),
    )


def _fit_tensors(name: str, kept: Any, new: Any, pad: float | None, whose: str) -> None:
    if isinstance(kept, Objects):
        return
    expected, got = (kept.shape[1:], kept.dtype, kept.device), (new.shape[1:], new.dtype, new.device)
    if expected == got:
        return
    is_longer = kept.dim() == new.dim() and expected[1:] == got[1:]
    if is_longer and pad is not None:
        if not _can_hold(kept.dtype, pad):
            raise ValueError(f"pad must be a number that {name} of {kept.dtype} can hold, got {pad!r:.50}")
        return
    raise DoNotFit(
        f"{name} must have the shape, dtype and device of {whose}, {describe(kept)}, got {describe(new)}"
        + ("; pad= of the memory takes different lengths" if is_longer else "")
    )


def _can_hold(dtype: torch.dtype, number: float) -> bool:
    if dtype.is_floating_point or dtype.is_complex:
        return True
    smallest, largest = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return smallest <= number <= largest and number == int(number)


def describe(x: Tensor) -> str:
    """The shape of an example, its dtype and its device."""
    return f"(n{''.join(f', {size}' for size in x.shape[1:])}) {x.dtype} on {x.device}"


def _pad_values(name: Hashable, value: Nest, pad: Pad, outer: float | None = None) -> Any:
    """The containers of a nest as dicts, with the number in the place of each tensor; None where there is none."""
    by_name = pad if isinstance(pad, Mapping) else {name: pad}
    mine = by_name.get(name)
    if isinstance(mine, Mapping):
        by_name = {**by_name, **mine}
    elif mine is not None:
        outer = mine
    parts = parts_of(value)
    return outer if parts is None else {key: _pad_values(key, x, by_name, outer) for key, x in parts.items()}


def _paths(name: str, value: Nest) -> Any:
    """The containers of a nest as dicts, with how it is reached in the place of each tensor."""
    parts = parts_of(value)
    return name if parts is None else {key: _paths(f"{name}[{key!r:.50}]", part) for key, part in parts.items()}


def padded_to(name: str, value: Nest, like: Sequence[Nest], pad: Pad) -> Nest:
    """`value`, right-padded to the longest of those that it is to be in one batch with.

    Args:
        name: "x" or "y".
        value: examples, which fit those of `like`.
        like: other examples.
        pad: of the memory.
    """

    def pad_one(x: Any, number: Any, *theirs: Any) -> Any:
        if not isinstance(x, Tensor) or all(x.shape[1:] == y.shape[1:] for y in theirs):
            return x
        shape = [len(x), *map(max, zip(*(y.shape[1:] for y in (x, *theirs)), strict=True))]
        if shape == list(x.shape):
            return x
        longer = x.new_full(shape, number)
        longer[tuple(map(slice, x.shape))] = x
        return longer

    return map_tensors(pad_one, value, _pad_values(name, value, pad), *like)


def concatenate(name: str, values: Sequence[Nest], pad: Pad = None) -> Nest:
    """Batches as one, one after the other, right-padded to the longest where `pad` says with what.

    Args:
        name: "x" or "y", for the error.
        values: the batches; all None where there are no targets.
        pad: what the memory pads with.

    Raises:
        DoNotFit: they differ in structure, dtype, device, or in a length without a value to pad it with.
    """
    first, *others = values
    for other in others:
        fit(name, first, other, pad, "the other tasks' examples")
    if isinstance(first, Tensor) and all(first.shape[1:] == other.shape[1:] for other in others):
        return torch.cat(list(values))
    together = [padded_to(name, value, values, pad) for value in values]
    return map_tensors(lambda *xs: _joined(xs), *together)


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return Objects([item for part in parts for item in part.items], parts[0].collate_fn)


# ---- outputs ---------------------------------------------------------------------------------------------------------


def split(value: Nest, sizes: list[int]) -> list[Nest] | None:
    """A model's output for several tasks as one for each: tensors (N, ...) are cut, all else is passed as it is.

    Args:
        value: the output for N examples, one task after the other.
        sizes: the number of examples of each task, N in total.

    Returns:
        One nest per task; None where no tensor has N examples.
    """
    n = sum(sizes)
    if isinstance(value, Tensor):
        return list(value.split(sizes)) if value.dim() and len(value) == n else None
    cut = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == n for x in tensors(value)]
    if not any(cut):
        return None
    slices = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def part(x: Any, mine: slice) -> Any:
        return x[mine] if isinstance(x, Tensor) and x.dim() > 0 and len(x) == n else x

    return [map_tensors(lambda x, mine=mine: part(x, mine), value) for mine in slices]
