"""Other people's GEM, for the benchmark of the whole training run: what a user would run instead.

Neither is installed with gem_fast: the published code is used from a checkout that BENCH_PUBLISHED names, Avalanche
where it can be imported.
"""

import importlib.util
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from training import BATCH, LR, MARGIN, MEMORY, Batches


def published(batches: Batches, tasks: int) -> Callable[[], object] | None:
    """A run of the published code's learner; None without a checkout."""
    checkout = os.environ.get("BENCH_PUBLISHED")
    if not checkout:
        return None
    sys.path.insert(0, checkout)
    from model.gem import Net

    args = Namespace(
        n_layers=2, n_hiddens=100, data_file="mnist_rotations.pt", lr=LR, n_memories=MEMORY, memory_strength=MARGIN,
        cuda=False,
    )  # fmt: skip

    def run() -> None:
        torch.manual_seed(0)
        net = Net(784, 10, tasks, args)
        for x, y, task in batches:
            net.observe(x, task, y)

    return run


def avalanche(batches: Batches, tasks: int, new_model: Callable[[], nn.Module]) -> Callable[[], object] | None:
    """A run of Avalanche's GEM plugin in its plain strategy, without evaluation; None where it is not installed."""
    if importlib.util.find_spec("avalanche") is None:
        return None
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training import Naive
    from avalanche.training.plugins import EvaluationPlugin, GEMPlugin
    from torch.utils.data import TensorDataset

    def dataset(task: int) -> Any:
        mine = [(x, y) for x, y, of in batches if of == task]
        x, y = (torch.cat(tensors) for tensors in zip(*mine, strict=True))
        data: Any = TensorDataset(x, y)
        data.targets = y.tolist()
        return as_classification_dataset(data)

    benchmark = benchmark_from_datasets(train=[dataset(task) for task in range(tasks)])

    def run() -> None:
        model = new_model()
        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=LR),
            train_mb_size=BATCH,
            train_epochs=1,
            plugins=[GEMPlugin(patterns_per_experience=MEMORY, memory_strength=MARGIN)],
            evaluator=EvaluationPlugin(),
        )
        for experience in benchmark.train_stream:
            strategy.train(experience, num_workers=0, shuffle=False)

    return run
