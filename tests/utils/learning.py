"""Streams and mini-batches for the tests of the learners: real digits, tasks with shared outputs and with their own."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gem_fast.paper.data import MNIST_5K, load_data
from gem_fast.paper.learners import PRESETS, make_learner
from gem_fast.paper.learners.stream_info import StreamInfo
from gem_fast.paper.streams import Stream, permutations, split

CPU = torch.device("cpu")
KINDS = ("shared", "multi-head")

Batches = list[tuple[Tensor, Tensor, int]]


@cache
def digits(kind: str, n_tasks: int = 3, samples: int = 200) -> Stream:
    """Permuted digits, all with outputs 0 to 9, or pairs of digits with two outputs each."""
    data = load_data(MNIST_5K)
    generator = torch.Generator().manual_seed(0)
    if kind == "shared":
        return permutations(data, n_tasks, samples, generator)
    pairs = split(data, 5, samples, generator)
    return replace(pairs, tasks=pairs.tasks[:n_tasks])


def stream_info(kind: str, n_tasks: int = 3) -> StreamInfo:
    return StreamInfo.of(digits(kind, n_tasks))


def make(name: str, kind: str, **hyper: Any) -> Any:
    """A learner with the options of `split`, a small memory, and those given."""
    torch.manual_seed(0)
    small = {"memory_per_task": 50, "memory_batch": 50, "memory": 90, "lr": 0.1}
    preset = PRESETS["split", name]
    options = preset | {key: value for key, value in small.items() if key in preset} | hyper
    return make_learner(name, stream_info(kind), CPU, **options)


def batches(kind: str, per_task: int = 20, tasks: tuple[int, ...] = (0, 1, 2)) -> Batches:
    """The first mini-batches of ten examples of each task."""
    generator = torch.Generator().manual_seed(1)
    stream = digits(kind)
    return [(x, y, task) for task in tasks for x, y in list(stream.batches(task, 10, 1, generator))[:per_task]]


def learn(learner: Any, mini_batches: Batches) -> Any:
    for x, y, task in mini_batches:
        learner.observe(x, y, task)
    return learner


def weights(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def accuracy(learner: Any, kind: str, task: int) -> float:
    learner.train(False)
    with torch.inference_mode():
        x, y = next(digits(kind).test_batches(task))
        right = (learner.predict(x, task).argmax(1) == y).float().mean().item()
    learner.train(True)
    return right
