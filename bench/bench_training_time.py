"""The whole training run, 2000 steps of the paper's settings on rotated digits: training time alone, no evaluation.

One round of everything takes minutes. BENCH_TASKS=5 or BENCH_ROUNDS=1 make it a quick look; BENCH_PUBLISHED names a
checkout of the published code to compare with, and Avalanche is compared with where it is installed.
"""

import os
from collections.abc import Callable

import torch
from interleave import interleave
from pytest_benchmark.fixture import BenchmarkFixture
from rivals import avalanche, published
from training import DEVICE, LR, MARGIN, MEMORY, RIDGE, TASKS, Batches, batches_of, gem, new_model, train

from gem_fast import EpisodicMemory, Fused
from gem_fast.reference import PurePythonGEM

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))


def bench_training_time(benchmark: BenchmarkFixture) -> None:
    batches = batches_of()
    rivals: dict[str, Callable[[], object]] = {"pure Python": lambda: pure_python(batches)}
    for name, run in (("published", published(batches, TASKS)), ("Avalanche", avalanche(batches, TASKS, new_model))):
        if run is not None and DEVICE.type == "cpu":
            rivals[name] = run
    rivals["single (no memory)"] = lambda: train(batches)
    interleave(benchmark, lambda: train(batches, gem()), rivals, rounds=ROUNDS, ready=False)


def bench_ways_to_train(benchmark: BenchmarkFixture) -> None:
    batches = batches_of()
    ways: dict[str, Callable[[], object]] = {
        "single (no memory)": lambda: train(batches),
        "hook, m' = 8": lambda: train(batches, gem(memory_batch=8)),
        "gem.step, m' = 32": lambda: train(batches, gem(memory_batch=32), by_step=True),
        "hook, r = 4": lambda: train(batches, gem(engine=Fused(refresh_every=4))),
        "gem.step, exact": lambda: train(batches, gem(), by_step=True),
        "hook, exact": lambda: train(batches, gem()),
    }
    interleave(benchmark, lambda: train(batches, gem(memory_batch=8), by_step=True), ways, rounds=ROUNDS, ready=False)
    medians = benchmark.extra_info["median_seconds"]
    medians["gem.step, m' = 8"] = medians["ours"]
    benchmark.extra_info["times_single"] = {way: medians[way] / medians["single (no memory)"] for way in medians}


def pure_python(batches: Batches) -> None:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    learner = PurePythonGEM(model, optimizer, EpisodicMemory(per_task=MEMORY), margin=MARGIN, ridge=RIDGE)
    for x, y, task in batches:
        learner.observe(x, y, task)
