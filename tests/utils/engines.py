"""Compares engines and forms of G with the loop."""

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gem_fast import Batch, Engine, Fused, Loop, Objective, Sample
from gem_fast.containers import map_tensors
from gem_fast.gradients import layerwise
from gem_fast.gradients.fused.verifier import Verifier
from gem_fast.ops import combine_
from utils.models import Loss

Memory = list[list[Batch]]


def memory(
    sizes: Sequence[int],
    inputs: Callable[[int], Tensor],
    targets: Callable[[int], Tensor],
    dtype: torch.dtype = torch.float64,
    descriptors: Sequence[Any] | None = None,
) -> Memory:
    """One batch per task, floating-point values in the model's dtype; descriptors: one per task."""

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    told = [map_tensors(cast, x) for x in descriptors or [None] * len(sizes)]
    return [[Batch(k, cast(inputs(n)), cast(targets(n)), None, told[k])] for k, n in enumerate(sizes)]


def half_of_each(sizes: Sequence[int]) -> Sample:
    """A random half of each task's examples, at least one."""
    taken = [(n + 1) // 2 for n in sizes]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    positions = [torch.randperm(n)[:m] + start for n, m, start in zip(sizes, taken, starts, strict=True)]
    return Sample(torch.cat(positions), taken)


def relu_mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def sparse_rows(n: int, width: int, part: float) -> Tensor:
    """Normal values, of which only a part is not zero."""
    return torch.where(torch.rand(n, width) < part, torch.randn(n, width), 0.0)


class Rows(NamedTuple):
    """What an engine gives back, as a matrix of its own."""

    G: Tensor
    depends: list[bool]


Bound = Callable[..., Rows]
"""bound(batches, parameters, sample=None): the rows of an engine for a model and a loss."""


def fused(model: nn.Module, loss_fn: Loss = F.cross_entropy, *, pass_task: bool = False, **options: Any) -> Bound:
    return bound(Fused(form="rows", **options), model, loss_fn, pass_task)


def loop(model: nn.Module, loss_fn: Loss = F.cross_entropy, *, pass_task: bool = False) -> Bound:
    return bound(Loop(), model, loss_fn, pass_task)


def bound(engine: Engine, model: nn.Module, loss_fn: Loss, pass_task: bool) -> Bound:
    objective = Objective(model, loss_fn, pass_task)

    def call(batches: Memory, parameters: Sequence[nn.Parameter], sample: Sample | None = None) -> Rows:
        got = engine(objective, batches, parameters, sample)
        return Rows(got.G.clone(), list(got.depends))

    return call


@contextmanager
def layerwise_by(products: bool, block_bytes: int = 2**24) -> Iterator[None]:
    """Has layerwise gradients take inner products of examples wherever they can, or blocks of columns everywhere."""
    with (
        mock.patch.object(layerwise, "products_are_cheaper", return_value=products),
        mock.patch.object(layerwise, "_BLOCK_BYTES", block_bytes),
    ):
        yield


def assert_as_the_loop(
    model: nn.Module,
    batches: Memory,
    loss_fn: Loss = F.cross_entropy,
    *,
    fallback: str | None = None,
    tolerance: float | None = None,
    pass_task: bool = False,
    sample: Sample | None = None,
    small_block: int = 200,
    **options: int,
) -> Bound:
    """Every form of G is the loop's, and so are dependences, buffers and projections.

    Rows are compared in a first pass (which is verified) and in a second one. `fallback`: what the one log line says
    where the model is left to the loop, and layerwise gradients refuse it; None: neither must be.
    """
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    # By default, nets of convolutions are left to the loop on a CPU, as it is faster there.
    limits = options or {"tasks_per_pass": len(batches)}
    engine, reference = fused(model, loss_fn, pass_task=pass_task, **limits), loop(twin, loss_fn, pass_task=pass_task)
    if tolerance is None:
        tolerance = 1e-10 if next(model.parameters()).dtype == torch.float64 else 1e-5
    with log_lines() as lines, verifications() as verified:
        for _ in range(2):
            state = torch.get_rng_state()
            expected = reference(batches, trained(twin), sample=sample)
            got = engine(batches, trained(model), sample=sample)
            assert torch.get_rng_state().equal(state)
            assert_rows_close(got.G, expected.G, tolerance)
            assert got.depends == expected.depends
            assert_buffers_close(model, twin, tolerance)
    assert_untouched(model)
    if fallback is None:
        assert lines == []
        assert "tasks_per_pass" not in limits or len(batches) == 1 or verified
        assert_projects_as_rows(
            other,
            batches,
            loss_fn,
            pass_task=pass_task,
            sample=sample,
            tolerance=tolerance,
            small_block=small_block,
        )
    else:
        assert len(lines) == 1
        assert fallback in lines[0], lines[0]
        with pytest.raises(RuntimeError, match='form="layerwise" takes a model that one pass can handle'):
            Fused(form="layerwise")(Objective(other, loss_fn, pass_task), batches, trained(other), sample)
        assert_untouched(other)
    return engine


@contextmanager
def verifications() -> Iterator[list[int]]:
    """Collects the numbers of tasks of all comparisons with the loop that a fused pass stands."""
    seen: list[int] = []
    verify = Verifier._check

    def counted(self: Verifier, batches: Sequence[Batch], learn_dims: bool = True) -> None:
        verify(self, batches, learn_dims)
        seen.append(len(batches))

    with mock.patch.object(Verifier, "_check", counted):
        yield seen


def assert_projects_as_rows(
    model: nn.Module,
    batches: Memory,
    loss_fn: Loss = F.cross_entropy,
    *,
    pass_task: bool = False,
    sample: Sample | None = None,
    tolerance: float = 1e-10,
    small_block: int = 200,
) -> None:
    """Layerwise gradients, by blocks of columns and by inner products, do what the loop's rows do.

    Blocks are once of `small_block` bytes. For gradients that violate no constraint, some and all: P, q, v and the
    gradient relative to its parts.
    """
    twin = copy.deepcopy(model)
    parameters, sizes = trained(model), [parameter.numel() for parameter in trained(model)]
    G, depends = loop(twin, loss_fn, pass_task=pass_task)(batches, trained(twin), sample=sample)
    start = copy.deepcopy(model.state_dict())
    mean = G.mean(0)
    directions = [-mean, torch.randn_like(mean) * mean.norm() / len(mean) ** 0.5 - G[-1] / 2, G[0]]
    for products, block_bytes in ((True, 2**24), (False, 2**24), (False, small_block)):
        model.load_state_dict(start)
        with layerwise_by(products, block_bytes):
            got = Fused(form="layerwise")(Objective(model, loss_fn, pass_task), batches, parameters, sample)
            assert got.depends == depends
            assert_buffers_close(model, twin, tolerance)
            columns = torch.cat(list(got.columns(parameters)), 1)
            assert ((columns - G).norm(dim=1) <= 10 * tolerance * (G.norm(dim=1) + 1e-300)).all()
            for g in directions:
                theirs, ours = (
                    [x.view_as(p).clone() for x, p in zip(g.split(sizes), parameters, strict=True)] for _ in "ab"
                )
                P, q = got.gram(ours)
                lengths = G.double().norm(dim=1)
                scale = float(lengths.max() * g.double().norm()) + 1e-300
                assert torch.allclose(q, (G @ g).double(), rtol=0, atol=10 * tolerance * scale)
                P_error = (P - G.double() @ G.double().T).abs()
                assert (P_error <= 10 * tolerance * (lengths[:, None] * lengths + 1e-300)).all()
                v = torch.linspace(0, 1, len(G), dtype=torch.float64)
                got.combine_(ours, v)
                combine_(theirs, G, v)
                for mine, right in zip(ours, theirs, strict=True):
                    assert (mine - right).norm() <= 10 * tolerance * (g.norm() + lengths.sum())
    assert_untouched(model)


def assert_buffers_close(model: nn.Module, twin: nn.Module, tolerance: float) -> None:
    for (name, mine), right in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(mine, right, rtol=tolerance, atol=tolerance), name


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
