"""Episodic memory: which examples of past tasks are kept (paper, Section 3), one policy per file."""

from collections.abc import Callable

from gem_fast.batches import check_examples
from gem_fast.memory.balanced import ClassBalancedMemory
from gem_fast.memory.checks import check_task, plain_task
from gem_fast.memory.herding import HerdingMemory
from gem_fast.memory.last import EpisodicMemory
from gem_fast.memory.protocol import Memory
from gem_fast.memory.reservoir import ReservoirMemory

__all__ = [
    "MEMORY_POLICIES",
    "ClassBalancedMemory",
    "EpisodicMemory",
    "HerdingMemory",
    "Memory",
    "ReservoirMemory",
    "check_examples",
    "check_task",
    "plain_task",
]

# Each is called with per_task=m or total=M.
MEMORY_POLICIES: dict[str, Callable[..., Memory]] = {
    "last": EpisodicMemory,
    "reservoir": ReservoirMemory,
    "class-balanced": ClassBalancedMemory,
    "herding": HerdingMemory,
}
