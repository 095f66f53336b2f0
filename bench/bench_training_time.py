"""The whole training run, 2000 steps of the paper's settings on rotated digits: training time alone, no evaluation.

One round of everything takes minutes. BENCH_TASKS=5 or BENCH_ROUNDS=1 make it a quick look; BENCH_PUBLISHED names a
checkout of the published code to compare with, and Avalanche is compared with where it is installed.
"""

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gradients import BATCH, DEVICE, LR, MARGIN, MEMORY, RIDGE
from interleave import interleave
from pytest_benchmark.fixture import BenchmarkFixture
from rivals import Batches, avalanche, published
from torch import nn

from gem_fast import AGEM, GEM, EpisodicMemory
from gem_fast.paper.data import MNIST_5K, load_data
from gem_fast.paper.models import mlp
from gem_fast.paper.streams import rotations
from gem_fast.reference import PurePythonGEM

TASKS = int(os.environ.get("BENCH_TASKS", "20"))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))


def bench_training_time(benchmark: BenchmarkFixture) -> None:
    batches = stream()
    rivals: dict[str, Callable[[], object]] = {"pure Python": lambda: pure_python(batches)}
    for name, run in (("published", published(batches, TASKS)), ("Avalanche", avalanche(batches, TASKS, fresh))):
        if run is not None and DEVICE.type == "cpu":
            rivals[name] = run
    rivals["single (no memory)"] = lambda: single(batches)
    interleave(benchmark, lambda: hooked(batches), rivals, rounds=ROUNDS, ready=False)


@pytest.mark.parametrize("options", [{"memory_batch": 32}, {"refresh_every": 4}], ids=str)
def bench_training_time_approximate(benchmark: BenchmarkFixture, options: dict[str, int]) -> None:
    batches = stream()
    rivals: dict[str, Callable[[], object]] = {
        "exact": lambda: hooked(batches),
        "A-GEM": lambda: hooked(batches, hook=AGEM),
        "single (no memory)": lambda: single(batches),
    }
    interleave(benchmark, lambda: hooked(batches, **options), rivals, rounds=ROUNDS, ready=False)


def hooked(batches: Batches, hook: type[GEM] = GEM, **options: int) -> None:
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    # A-GEM is published without a margin, which is its default.
    margin = {} if hook is AGEM else {"margin": MARGIN}
    gem = hook(model, optimizer, memory=EpisodicMemory(per_task=MEMORY), ridge=RIDGE, **margin, **options)
    for x, y, task in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gem.observe(x, y, task)
        optimizer.step()


def single(batches: Batches) -> None:
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for x, y, _ in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def pure_python(batches: Batches) -> None:
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    learner = PurePythonGEM(model, optimizer, EpisodicMemory(per_task=MEMORY), margin=MARGIN, ridge=RIDGE)
    for x, y, task in batches:
        learner.observe(x, y, task)


def stream() -> Batches:
    order = torch.Generator().manual_seed(0)
    tasks = rotations(load_data(MNIST_5K), TASKS, 1000, order).to(DEVICE)
    return [(x, y, task) for task in range(TASKS) for x, y in tasks.batches(task, BATCH, 1, order)]


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return mlp(784, 10).to(DEVICE)
