"""The paper's training run on digits: its settings, its mini-batches, and one run of a model with or without a hook.

    python bench/training.py rotations [MEMORY_BATCH]     prints the seconds of one run as JSON

bench_shortcuts.py runs it with other checkouts of gem_fast, so it keeps to names that those have, too.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from conftest import THREADS
from torch import Tensor, nn
from torch.optim import Optimizer

import gem_fast
from gem_fast.paper.data import MNIST_5K, load_data
from gem_fast.paper.models import mlp
from gem_fast.paper.streams import STREAMS

LR, MARGIN, RIDGE, MEMORY, BATCH = 0.1, 0.5, 1e-3, 256, 10
TASKS = int(os.environ.get("BENCH_TASKS", "20"))
# `make bench DEVICE=cuda` measures on a GPU.
DEVICE = torch.device(os.environ.get("DEVICE", "cpu"))

Batches = list[tuple[Tensor, Tensor, int]]
"""Inputs, labels and task of each mini-batch, in order."""
NewHook = Callable[[nn.Module, Optimizer], gem_fast.GEM]


def batches_of(stream: str = "rotations") -> Batches:
    """2000 mini-batches: 100 of each of 20 tasks."""
    order = torch.Generator().manual_seed(0)
    tasks = STREAMS[stream](load_data(MNIST_5K), TASKS, 1000, order).to(DEVICE)
    return [(x, y, task) for task in range(TASKS) for x, y in tasks.batches(task, BATCH, 1, order)]


def new_model() -> nn.Module:
    """The paper's network, with the same weights each time."""
    torch.manual_seed(0)
    return mlp(784, 10).to(DEVICE)


def gem(**options: Any) -> NewHook:
    """GEM with the paper's settings and these options."""
    return lambda model, optimizer: gem_fast.GEM(
        model, optimizer, memory=gem_fast.EpisodicMemory(per_task=MEMORY), margin=MARGIN, ridge=RIDGE, **options
    )


def train(
    batches: Batches, new_hook: NewHook | None = None, model: nn.Module | None = None, *, by_step: bool = False
) -> None:
    """One run, with plain SGD where there is no hook, and through `hook.step` if `by_step`."""
    model = new_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hook = None if new_hook is None else new_hook(model, optimizer)
    for x, y, task in batches:
        if by_step:
            hook.step(x, y, task)
            continue
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if hook is not None:
            hook.observe(x, y, task)
        optimizer.step()


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    stream, *memory_batch = sys.argv[1:]
    options = {"memory_batch": int(memory_batch[0])} if memory_batch else {}
    torch.set_num_threads(THREADS)
    batches = batches_of(stream)
    train(batches[:200], gem(**options))  # what is loaded on first use is not timed
    print(json.dumps({"seconds": seconds_of(lambda: train(batches, gem(**options))), "gem_fast": gem_fast.__file__}))


if __name__ == "__main__":
    main()
