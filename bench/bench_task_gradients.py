"""The rows of G alone: one fused pass against one backward per task, and torch.func's way."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from gradients import BATCH, DEVICE, MEMORY
from interleave import interleave
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gem_fast import FusedTaskGradients, LoopTaskGradients
from gem_fast.paper.data import MNIST_5K, load_data
from gem_fast.paper.models import mlp, resnet18
from gem_fast.paper.streams import rotations
from gem_fast.task_gradients import Batch
from gem_fast.task_gradients.rows import new_rows


@pytest.mark.parametrize("size", [32, MEMORY])
@pytest.mark.parametrize("t", [3, 10, 19])
def bench_mlp(benchmark: BenchmarkFixture, t: int, size: int) -> None:
    order = torch.Generator().manual_seed(0)
    stream = rotations(load_data(MNIST_5K), t, size, order).to(DEVICE)
    constraints = [[Batch(k, *next(iter(stream.batches(k, size, 1, order))))] for k in range(t)]
    torch.manual_seed(0)
    model = mlp(stream.n_inputs, stream.n_outputs).to(DEVICE)
    parameters = list(model.parameters())
    fused, loop = (engine(model, F.cross_entropy) for engine in (FusedTaskGradients, LoopTaskGradients))
    out = new_rows(t, parameters)
    rivals = {
        "loop": lambda: loop(constraints, parameters, out=out),
        "vmap(grad)": lambda: by_vmap(model, constraints, out),
    }
    interleave(benchmark, lambda: fused(constraints, parameters, out=out), rivals, rounds=30)


@pytest.mark.parametrize("size", [BATCH, 64])
@pytest.mark.parametrize("t", [5, 19])
def bench_resnet18(benchmark: BenchmarkFixture, t: int, size: int) -> None:
    """On a CPU the default leaves convolutions to the loop: here it is made to fuse, to see what that would cost."""
    torch.manual_seed(0)
    model = resnet18(100).to(DEVICE)
    constraints = [
        [Batch(k, torch.randn(size, 3, 32, 32, device=DEVICE), torch.randint(100, (size,), device=DEVICE))]
        for k in range(t)
    ]
    parameters = list(model.parameters())
    out = new_rows(t, parameters)
    default, loop = (engine(model, F.cross_entropy) for engine in (FusedTaskGradients, LoopTaskGradients))
    fused = FusedTaskGradients(model, F.cross_entropy, tasks_per_pass=t)
    rivals = {
        "loop": lambda: loop(constraints, parameters, out=out),
        "fused": lambda: fused(constraints, parameters, out=out),
    }
    interleave(benchmark, lambda: default(constraints, parameters, out=out), rivals, rounds=3)


def by_vmap(model: nn.Module, constraints: Sequence[Sequence[Batch]], out: Tensor) -> None:
    """What torch offers: the tasks' inputs stacked, the gradient mapped over them, and the result copied into G."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, x), y)

    x = torch.stack([batch.x for [batch] in constraints])
    y = torch.stack([batch.y for [batch] in constraints])
    rows = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    start = 0
    for row in rows.values():
        out[:, start : start + row[0].numel()].copy_(row.flatten(1))
        start += row[0].numel()
