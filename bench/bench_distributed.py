"""What a second process gains: a step of GEM in one process against two of DistributedDataParallel, part by part.

    python bench/bench_distributed.py             prints Markdown, and writes bench/results/distributed.json
    BENCH_ROUNDS=1 python bench/bench_distributed.py mlp    a quick look at one model

Each process has one thread. Strong scaling: the same memory in all, of which each of two processes has half; weak
scaling: the same memory on each process. "Pass" is the engine's pass over the memory, "exchange" the reduce-scatter and
the all-gather, "solve" P and q with their all-reduce; in one process all of the projection. In a round, one and two
processes run in turn; a figure is the median over the rounds of the mean over the steps, of the slower process of two.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gem_fast
from gem_fast.gradients import sharded
from gem_fast.paper.models import ResNet18, mlp

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
RESULT = Path(__file__).parent / "results" / "distributed.json"
PARTS = ("step", "pass", "exchange", "solve")


class Transformer(nn.Module):
    """26 million parameters: 8 layers of 512, over 32 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 512)
        layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)).mean(1))


class Case(NamedTuple):
    """A model, its inputs, and how much of the past there is."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    tasks: int
    memory: int
    steps: int


CASES = {
    "mlp": Case(lambda: mlp(784, 10), lambda n: torch.rand(n, 784) * (torch.rand(n, 784) < 0.2), 19, 256, 30),
    "resnet18": Case(lambda: ResNet18(10), lambda n: torch.rand(n, 3, 32, 32), 4, 32, 2),
    "transformer": Case(Transformer, lambda n: torch.randint(1000, (n, 32)), 4, 32, 2),
}


@contextmanager
def timed(owner: Any, name: str, seconds: dict[str, float], part: str) -> Iterator[None]:
    original = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **options)
        finally:
            seconds[part] += time.perf_counter() - start

    with patch.object(owner, name, call):
        yield


def seconds_per_step(name: str, memory: int, memory_batch: int | None, rank: int) -> dict[str, float]:
    """The mean over the steps of the time that each part takes."""
    case = CASES[name]
    torch.manual_seed(0)
    model: nn.Module = case.model()
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kept = gem_fast.EpisodicMemory(per_task=memory)
    gem = gem_fast.GEM(model, optimizer, memory=kept, memory_batch=memory_batch)
    torch.manual_seed(rank)
    for task in range(case.tasks):
        kept.observe(case.inputs(memory), torch.randint(10, (memory,)), task)

    def step() -> None:
        x, y = case.inputs(10), torch.randint(10, (10,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gem.observe(x, y, case.tasks)
        start = time.perf_counter()
        optimizer.step()
        seconds["step"] += time.perf_counter() - start

    seconds: dict[str, float] = defaultdict(float)
    for _ in range(2):  # what is compared and built once
        step()
    seconds.clear()
    with (
        timed(gem_fast.Fused, "__call__", seconds, "pass"),
        timed(sharded.ColumnShare, "exchange", seconds, "exchange"),
        timed(sharded.ColumnShare, "combine_", seconds, "exchange"),
        timed(sharded.ShardedGradients, "gram", seconds, "solve"),
        timed(sys.modules["gem_fast.gem"], "project_", seconds, "projection"),
    ):
        for _ in range(case.steps):
            step()
    if not dist.is_initialized():
        seconds["solve"] = seconds["projection"]
    return {part: seconds[part] / case.steps for part in PARTS}


def work(rank: int, size: int, store: str, results: Any, *args: Any) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    results.put((rank, seconds_per_step(*args, rank)))
    if size > 1:
        dist.destroy_process_group()


def slowest(size: int, *args: Any) -> dict[str, float]:
    """The parts' times, each of the rank that took longest."""
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (size, f"{folder}/store", results, *args), nprocs=size)
    found = [results.get()[1] for _ in range(size)]
    return {part: max(seconds[part] for seconds in found) for part in PARTS}


def measured(name: str, memory_batch: int | None) -> dict[str, dict[str, float]]:
    case = CASES[name]
    kinds = {"one": (1, case.memory), "two, strong": (2, case.memory // 2), "two, weak": (2, case.memory)}
    samples = {"one": memory_batch, "two, strong": memory_batch and memory_batch // 2, "two, weak": memory_batch}
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, (size, memory) in kinds.items():
            rounds[kind].append(slowest(size, name, memory, samples[kind]))
    return {
        kind: {part: statistics.median(seconds[part] for seconds in found) for part in PARTS}
        for kind, found in rounds.items()
    }


def main() -> None:
    results = {}
    print("| model | memory | processes | step | pass | exchange | solve | pass of one / of two |")
    print("|---|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or CASES:
        for memory_batch in (None, 32):
            label = "exact" if memory_batch is None else f"m' = {memory_batch}"
            results[f"{name}, {label}"] = found = measured(name, memory_batch)
            for kind, seconds in found.items():
                times = " | ".join(f"{1e3 * seconds[part]:.2f} ms" for part in PARTS)
                print(f"| {name} | {label} | {kind} | {times} | {found['one']['pass'] / seconds['pass']:.2f} |")
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
