"""The whole training run, 2000 steps of the paper's settings on rotated digits: training time alone, no evaluation.

One round of everything takes minutes. BENCH_TASKS=5 makes it a quick look.
"""

import os

import torch
from gradients import BATCH, DEVICE, LR, MARGIN, MEMORY, RIDGE
from interleave import interleave
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from gem_fast import EpisodicMemory
from gem_fast.paper.data import MNIST_5K, load_data
from gem_fast.paper.learners import LEARNERS, Learner
from gem_fast.paper.setting import Setting
from gem_fast.paper.streams import Stream, rotations
from gem_fast.reference import PurePythonGEM

TASKS = int(os.environ.get("BENCH_TASKS", "20"))


def bench_training_time(benchmark: BenchmarkFixture) -> None:
    stream = rotations(load_data(MNIST_5K), TASKS, 1000, torch.Generator().manual_seed(0)).to(DEVICE)
    order = torch.Generator().manual_seed(1)
    batches = [(x, y, task) for task in range(TASKS) for x, y in stream.batches(task, BATCH, 1, order)]

    def ours() -> None:
        train(fresh(stream, "gem", LR, MEMORY, MARGIN, RIDGE), batches)

    def pure_python() -> None:
        torch.manual_seed(0)
        model = setting(stream).new_model().to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        train(PurePythonGEM(model, optimizer, EpisodicMemory(per_task=MEMORY), margin=MARGIN, ridge=RIDGE), batches)

    def single() -> None:
        train(fresh(stream, "single", LR), batches)

    interleave(benchmark, ours, {"pure Python": pure_python, "no memory (single)": single}, rounds=3, ready=False)


def train(learner: Learner | PurePythonGEM, batches: list[tuple[Tensor, Tensor, int]]) -> None:
    for x, y, task in batches:
        learner.observe(x, y, task)


def fresh(stream: Stream, name: str, *hyper: float) -> Learner:
    torch.manual_seed(0)
    return LEARNERS[name](setting(stream), DEVICE, *hyper)


def setting(stream: Stream) -> Setting:
    return Setting.of(stream)
