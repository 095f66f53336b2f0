"""The states of all ranks in one, and what a rank takes of it where there are more or fewer ranks than there were."""

import io
import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from gem_fast.batches import concatenate, select, size_of
from gem_fast.memory.base import PolicyMemory
from gem_fast.memory.herding import HerdingMemory
from gem_fast.memory.protocol import Memory


def pack(states: Sequence[dict[str, Any]]) -> bytes:
    """The states of all ranks as one value, which torch.distributed.checkpoint saves and loads whatever it holds."""
    file = io.BytesIO()
    torch.save(list(states), file)
    return file.getvalue()


def unpack(packed: Any) -> list[dict[str, Any]]:
    """The states of all ranks.

    Raises:
        ValueError: that is not what `pack` returned.
    """
    try:
        states = torch.load(io.BytesIO(packed), weights_only=True)
    except Exception as error:
        raise ValueError(
            f"ranks of the state must be what a hook's state_dict has there, got {packed!r:.50}"
        ) from error
    if not isinstance(states, list) or not states:
        raise ValueError(f"ranks of the state must be those of some ranks, got {states!r:.50}")
    return states


def load_share(memory: Memory, states: Sequence[dict[str, Any]], rank: int, size: int) -> None:
    """Takes one of `size` equal shares of the memories of all ranks there were: together they hold the same examples.

    The memory's size changes with the number of ranks, so that all of them have room for as many examples as before.

    Args:
        memory: the memory of this rank.
        states: of the memories of the ranks there were.
        rank: the number of this rank.
        size: the number of ranks there are.

    Raises:
        ValueError: the states do not fit the memory, or it is none of the library's. The memory is then as it was.
    """
    if not isinstance(memory, PolicyMemory):
        raise ValueError(
            f"the state of {len(states)} ranks can be loaded by {size} only into memories of gem_fast, "
            f"got {type(memory).__name__}"
        )
    before = memory.state_dict()
    sizes = memory.per_task, memory.total
    try:
        for state in states:
            memory.load_state_dict(state)  # which checks it
        memory.per_task, memory.total = (_scaled(n, len(states) / size) for n in sizes)
        memory.load_state_dict(_share(states, memory, rank, size))
    except ValueError:
        memory.per_task, memory.total = sizes
        memory.load_state_dict(before)
        raise


def _scaled(n: Any, factor: float) -> Any:
    return math.ceil(n * factor) if isinstance(n, int) else n  # "all", or None where the other size is given


def _share(states: Sequence[dict[str, Any]], memory: PolicyMemory, rank: int, size: int) -> dict[str, Any]:
    by_task: dict[Hashable, list[dict[str, Any]]] = {}
    for state in states:
        for entry in state["tasks"]:
            by_task.setdefault(entry["task"], []).append(entry)
    shares = []
    capacity = memory._capacity(max(1, len(by_task)))
    for task, entries in by_task.items():
        # The oldest of all ranks first, as far as their order tells.
        ages = torch.cat([_ages(entry) for entry in entries])
        mine = ages.argsort(stable=True)[rank::size]
        if isinstance(memory, HerdingMemory) and entries[0]["open"]:
            mine = mine[-memory.candidates :]
        if not len(mine):
            continue
        share = {"task": task}
        for name in ("x", "y"):
            share[name] = select(concatenate(name, [entry[name] for entry in entries], memory.pad), mine)
        n = len(mine)
        if "next" in entries[0]:
            share["next"] = n % capacity
        if "seen" in entries[0]:
            share["seen"] = n if n < capacity else max(n, sum(entry["seen"] for entry in entries) // size)
        if "times" in entries[0]:
            share["times"] = torch.arange(n)
        if "open" in entries[0]:
            share["open"] = entries[0]["open"]
        shares.append(share)
    return {**states[rank % len(states)], "per_task": memory.per_task, "total": memory.total, "tasks": shares}


def _ages(entry: dict[str, Any]) -> torch.Tensor:
    """(n,): 0 for the oldest example, and so on."""
    n = size_of(entry["x"])
    if "times" in entry:
        times: torch.Tensor = entry["times"]
        return times.argsort().argsort()
    oldest = entry.get("next", 0) % n  # of a ring that is full; one that is not has its oldest in slot 0
    return torch.arange(n).sub(oldest).remainder(n)
