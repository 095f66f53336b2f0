"""Table 1 of the paper: the training time of its learners, of GEM in pure Python as published, and of A-GEM.

The published settings on 20 tasks of 1000 digits; training time alone, no evaluation. A round of everything takes
minutes, most of it GEM in pure Python. BENCH_TASKS=5 makes it a quick look.
"""

import os

import pytest
import torch
from interleave import interleave
from pytest_benchmark.fixture import BenchmarkFixture
from training import DEVICE, TASKS

from gem_fast.paper.experiments.training_run import TrainingRun, configuration, hyper_parameters
from gem_fast.paper.learners import make_learner
from gem_fast.paper.learners.stream_info import StreamInfo

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))
# name in the results -> learner; gem is the one under test
RIVALS = {
    "single": "single",
    "independent": "independent",
    "multimodal": "multimodal",
    "EWC": "ewc",
    "GEM, pure Python": "gem_pure_python",
    "A-GEM": "agem",
}


@pytest.mark.parametrize("stream", ["permutations", "rotations"])
def bench_table1(benchmark: BenchmarkFixture, stream: str) -> None:
    interleave(
        benchmark,
        Training(stream, "gem"),
        {name: Training(stream, learner) for name, learner in RIVALS.items()},
        rounds=ROUNDS,
        ready=False,
    )


class Training:
    """A learner's training on a stream, from its first example; each call is of a new learner."""

    def __init__(self, stream: str, learner: str) -> None:
        made = TrainingRun(configuration(stream, learner, tasks=TASKS, device=str(DEVICE)))
        order = torch.Generator().manual_seed(1)
        self.batches = [
            (x, y, experience.task)
            for experience in made.schedule.experiences
            for x, y in made.stream.batches(experience.task, made.schedule.batch_size, 1, order, experience.examples)
        ]
        self.stream_info = StreamInfo.of(made.stream)
        self.learner = learner
        self.hyper = hyper_parameters(stream, learner, {})

    def __call__(self) -> None:
        torch.manual_seed(0)
        learner = make_learner(self.learner, self.stream_info, DEVICE, **self.hyper)
        for x, y, task in self.batches:
            learner.observe(x, y, task)
