"""Compares the fused engine with the loop."""

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gem_fast import FusedTaskGradients, LoopTaskGradients, project_
from gem_fast.task_gradients import Batch, Sample
from utils.models import Loss

Memory = list[list[Batch]]


def memory(
    sizes: Sequence[int],
    inputs: Callable[[int], Tensor],
    targets: Callable[[int], Tensor],
    dtype: torch.dtype = torch.float64,
) -> Memory:
    """One batch per task, floating-point values in the model's dtype."""

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    return [[Batch(task, cast(inputs(n)), cast(targets(n)))] for task, n in enumerate(sizes)]


def half_of_each(sizes: Sequence[int]) -> Sample:
    """A random half of each task's examples, at least one."""
    taken = [(n + 1) // 2 for n in sizes]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    positions = [torch.randperm(n)[:m] + start for n, m, start in zip(sizes, taken, starts, strict=True)]
    return Sample(torch.cat(positions), taken)


def relu_chain(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def sparse_rows(n: int, width: int, part: float) -> Tensor:
    """Normal values, of which only a part is not zero."""
    return torch.where(torch.rand(n, width) < part, torch.randn(n, width), 0.0)


def assert_as_the_loop(
    model: nn.Module,
    batches: Memory,
    loss_fn: Loss = F.cross_entropy,
    *,
    fallback: str | None = None,
    tolerance: float | None = None,
    pass_task: bool = False,
    sample: Sample | None = None,
    **options: int,
) -> FusedTaskGradients:
    """Rows, dependences and buffers as the loop's, in a first pass (which is verified) and in a second one.

    `fallback`: what the one log line says where the model is left to the loop; None: it must not be.
    """
    twin = copy.deepcopy(model)
    # By default, nets of convolutions are left to the loop on a CPU, as it is faster there.
    options = options or {"tasks_per_pass": len(batches)}
    engine = FusedTaskGradients(model, loss_fn, pass_task=pass_task, **options)
    reference = LoopTaskGradients(twin, loss_fn, pass_task=pass_task)
    if tolerance is None:
        tolerance = 1e-10 if next(model.parameters()).dtype == torch.float64 else 1e-5
    with log_lines() as lines:
        for _ in range(2):
            state = torch.get_rng_state()
            expected = reference(batches, trained(twin), sample=sample)
            got = engine(batches, trained(model), sample=sample)
            assert torch.get_rng_state().equal(state)
            assert_rows_close(got.G, expected.G, tolerance)
            assert got.reached == expected.reached
            for (name, mine), right in zip(model.named_buffers(), twin.buffers(), strict=True):
                assert torch.allclose(mine, right, rtol=tolerance, atol=tolerance), name
    assert_untouched(model)
    if fallback is None:
        assert lines == []
        assert "tasks_per_pass" not in options or len(batches) == 1 or engine._plan.verified
    else:
        assert len(lines) == 1
        assert fallback in lines[0], lines[0]
    return engine


def assert_projects_as_rows(
    projection: Callable[..., Any],
    model: nn.Module,
    batches: Memory,
    loss_fn: Loss = F.cross_entropy,
    *,
    pass_task: bool = False,
    sample: Sample | None = None,
    tolerance: float = 1e-10,
) -> None:
    """projection(model, loss_fn, pass_task=...) projects as project_ does on the loop's rows.

    For gradients that violate no constraint, some and all: v and q, and the gradient relative to its parts.
    """
    twin = copy.deepcopy(model)
    parameters = trained(model)
    sizes = [parameter.numel() for parameter in parameters]
    G, reached = LoopTaskGradients(twin, loss_fn, pass_task=pass_task)(batches, trained(twin), sample=sample)
    project = projection(model, loss_fn, pass_task=pass_task)
    mean = G.mean(0)
    directions = {"all": -mean, "some": torch.randn_like(mean) * mean.norm() / len(mean) ** 0.5 - G[-1] / 2}
    if len(G) == 1:
        directions["none"] = G[0]
    for g in directions.values():
        for margin, ridge in ((0.5, 0.0), (0.0, 1e-3)):
            theirs, ours = (
                [x.view_as(p).clone() for x, p in zip(g.split(sizes), parameters, strict=True)] for _ in "ab"
            )
            expected = project_(theirs, G, margin, ridge)
            got, reached_by_ours = project(batches, parameters, ours, margin, ridge, sample=sample)
            assert reached_by_ours == reached
            assert torch.allclose(got.q, expected.q, rtol=tolerance, atol=tolerance * float(G.norm() * g.norm()))
            assert torch.allclose(got.v, expected.v, rtol=100 * tolerance, atol=tolerance)
            assert int(got.status) == int(expected.status) == 0
            assert float(got.residual) <= 1e-6
            scale = g.norm() + (G.norm(dim=1) * expected.v).sum()
            for mine, right in zip(ours, theirs, strict=True):
                assert (mine - right).norm() <= 10 * tolerance * scale
    assert_untouched(model)


def assert_rows_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (got.double() - expected.double()).norm(dim=1)
    assert (error <= tolerance * expected.double().norm(dim=1)).all(), error


def assert_untouched(model: nn.Module) -> None:
    """The pass has left no `.grad`, no forward in a module's __dict__ and no alias in place of a parameter."""
    assert all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert all(p is None or isinstance(p, nn.Parameter) for p in module._parameters.values())


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """Collects what gem_fast logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("gem_fast")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
