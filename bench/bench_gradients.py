"""The past tasks' gradients: one fused pass against one backward per task and torch.func's way, and the forms of G."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from bench_memory import MODELS
from interleave import interleave
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from training import BATCH, DEVICE, MARGIN, MEMORY

from gem_fast import Batch, Constraint, Engine, Fused, Loop, Objective, project_
from gem_fast.gradients.rows import rows_for
from gem_fast.paper.data import MNIST_5K, load_data
from gem_fast.paper.models import ResNet18, mlp
from gem_fast.paper.streams import rotations


@pytest.mark.parametrize("size", [32, MEMORY])
@pytest.mark.parametrize("t", [3, 10, 19])
def bench_mlp(benchmark: BenchmarkFixture, t: int, size: int) -> None:
    """The rows of G alone."""
    model, constraints = digits(t, size)
    G = rows_for(t, list(model.parameters()))
    rivals = {
        "loop": gradients_by(Loop(), model, constraints),
        "vmap(grad)": lambda: by_vmap(model, constraints, G),
    }
    interleave(benchmark, gradients_by(Fused(form="rows"), model, constraints), rivals, rounds=30)


@pytest.mark.parametrize("size", [BATCH, 64])
@pytest.mark.parametrize("t", [5, 19])
def bench_resnet18(benchmark: BenchmarkFixture, t: int, size: int) -> None:
    """On a CPU the default leaves convolutions to the loop: here it is made to fuse, to see what that would cost."""
    torch.manual_seed(0)
    model = ResNet18(100).to(DEVICE)
    constraints = [
        [Batch(k, torch.randn(size, 3, 32, 32, device=DEVICE), torch.randint(100, (size,), device=DEVICE))]
        for k in range(t)
    ]
    rivals = {
        "loop": gradients_by(Loop(), model, constraints),
        "fused": gradients_by(Fused(tasks_per_pass=t), model, constraints),
    }
    interleave(benchmark, gradients_by(Fused(), model, constraints), rivals, rounds=3)


@pytest.mark.parametrize("size", [8, 32, MEMORY])
@pytest.mark.parametrize("t", [5, 19])
def bench_mlp_forms(benchmark: BenchmarkFixture, t: int, size: int) -> None:
    """G in each of its forms, and the projection with it."""
    forms(benchmark, *digits(t, size), rounds=30)


@pytest.mark.parametrize("t", [5, 10])
def bench_transformer_forms(benchmark: BenchmarkFixture, t: int) -> None:
    """The same for a network of 26 million parameters and 4 short sequences of each task."""
    torch.manual_seed(0)
    model, constraints = MODELS["transformer"](t)
    on_device = [[Batch(task, x.to(DEVICE), y.to(DEVICE))] for [(task, x, y)] in constraints]
    forms(benchmark, model.to(DEVICE), on_device, rounds=3)


def forms(benchmark: BenchmarkFixture, model: nn.Module, constraints: Sequence[Constraint], rounds: int) -> None:
    """The default against either form, and against the loop."""
    parameters = list(model.parameters())
    [first] = constraints[0]
    uphill = [-x for x in torch.autograd.grad(F.cross_entropy(model(first.x), first.y), parameters)]
    grads = [x.clone() for x in uphill]

    def projected_by(engine: Engine) -> Callable[[], object]:
        compute = gradients_by(engine, model, constraints)

        def project() -> None:
            torch._foreach_copy_(grads, uphill)  # every method projects the same gradient, and pays for this copy
            project_(grads, compute(), MARGIN)

        return project

    rivals = {
        "rows": projected_by(Fused(form="rows")),
        "layerwise": projected_by(Fused(form="layerwise")),
        "loop": projected_by(Loop()),
    }
    interleave(benchmark, projected_by(Fused()), rivals, rounds=rounds)


def gradients_by(engine: Engine, model: nn.Module, constraints: Sequence[Constraint]) -> Callable[[], object]:
    objective, parameters = Objective(model, F.cross_entropy), list(model.parameters())
    return lambda: engine(objective, constraints, parameters)


def digits(t: int, size: int) -> tuple[nn.Module, list[Constraint]]:
    """The network of the MNIST experiments, and so many rotated digits of each of t tasks."""
    order = torch.Generator().manual_seed(0)
    stream = rotations(load_data(MNIST_5K), t, size, order).to(DEVICE)
    constraints = [[Batch(k, *next(iter(stream.batches(k, size, 1, order))))] for k in range(t)]
    torch.manual_seed(0)
    return mlp(stream.input_shape[0], stream.n_outputs).to(DEVICE), constraints


def by_vmap(model: nn.Module, constraints: Sequence[Constraint], G: Tensor) -> None:
    """What torch offers: the tasks' inputs stacked, the gradient mapped over them, and the result copied into G."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, x), y)

    x = torch.stack([batch.x for [batch] in constraints])
    y = torch.stack([batch.y for [batch] in constraints])
    rows = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    start = 0
    for row in rows.values():
        G[:, start : start + row[0].numel()].copy_(row.flatten(1))
        start += row[0].numel()
