"""Streams of tasks (section 5 of the paper), registered here under the name the command line uses."""

from collections.abc import Callable
from typing import Literal

from gem_fast.paper.streams.base import Stream, Task
from gem_fast.paper.streams.classes import cifar100, split
from gem_fast.paper.streams.pixels import permutations, rotations

__all__ = ["STREAMS", "Stream", "StreamName", "Task", "cifar100", "permutations", "rotations", "split"]

StreamName = Literal["rotations", "permutations", "cifar100", "split"]
# Each takes an ImageData, the number of tasks, the training examples of each task and a generator.
STREAMS: dict[str, Callable[..., Stream]] = {
    "rotations": rotations,
    "permutations": permutations,
    "cifar100": cifar100,
    "split": split,
}
