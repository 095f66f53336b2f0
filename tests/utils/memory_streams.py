"""Small streams of examples for the tests of memories."""

import io
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from gem_fast import MEMORY_POLICIES, Memory

# Mini-batches: the task and the number of examples of each.
BATCHES = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=12)
# Sizes of memories.
SIZES = st.one_of(st.builds(dict, per_task=st.integers(1, 12)), st.builds(dict, total=st.integers(5, 30)))


def batch(first: int, n: int, n_classes: int = 3) -> tuple[Tensor, Tensor]:
    """Examples first, first + 1, ..., of a class each: x (n, 2) holds the number and a feature."""
    numbers = torch.arange(first, first + n)
    return torch.stack([numbers, (7 * numbers) % 11], 1).double(), (numbers * numbers) % n_classes


def numbers(memory: Memory, task: object) -> list[int]:
    """The numbers of the examples kept, in the memory's order."""
    x, y = memory.examples(task)
    kept = x[:, 0].long()
    assert torch.equal(x, torch.stack([kept, (7 * kept) % 11], 1).double())
    assert torch.equal(y, (kept * kept) % 3)
    return kept.tolist()


def seen_by(memory: Memory, batches: list[tuple[int, int]], seen: dict[int, int] | None = None) -> dict[int, int]:
    """Shows mini-batches to a memory; returns how many examples it has seen of each task."""
    seen = {} if seen is None else dict(seen)
    for task, n in batches:
        memory.observe(*batch(seen.get(task, 0), n), task)
        seen[task] = seen.get(task, 0) + n
    return seen


def through_a_file(state: Any) -> Any:
    """What a checkpoint gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def make(policy: str, **options: Any) -> Any:
    """A memory."""
    return MEMORY_POLICIES[policy](**options)
