"""Mixed precision: autocast, GradScaler, parameters in half precision."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from utils.asserts import assert_same_bits
from utils.engines import loop
from utils.models import mlp, stream
from utils.training import at_a_conflict, flat_grad, sgd, weights

from gem_fast import AGEM, GEM, EpisodicMemory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
def test_autocast_with_grad_scaler(dtype: torch.dtype, fused: bool) -> None:
    model = mlp()
    optimizer = sgd(model, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    projected = 0
    with GEM(model, optimizer, memory=EpisodicMemory(per_task=16), margin=0.5) as gem:
        for x, y, task in stream(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                output = model(x)
                assert output.dtype == dtype
                loss = F.cross_entropy(output, y)
            scaler.scale(loss).backward()
            unprojected = flat_grad(model) / 1024
            gem.observe(x, y, task)
            engine = loop(model)
            G = engine(gem.constraints()[0], list(model.parameters())).G.double() if task else None
            scaler.step(optimizer)
            scaler.update()
            if G is None:
                continue
            # The gradient that came in was the true one: the margin is in its units.
            assert gem.last is not None
            assert torch.allclose(gem.last.q, G @ unprojected.double(), rtol=1e-4, atol=1e-5)
            expected = unprojected.double() + G.T @ gem.last.v
            assert torch.allclose(flat_grad(model).double(), expected, rtol=1e-4, atol=1e-5)
            projected += bool(gem.last.violations.any())
    assert projected > 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_step_with_infinite_gradients_is_skipped(fused: bool, unscale_first: bool) -> None:
    model = mlp()
    optimizer = sgd(model, momentum=0.9, fused=fused)
    gem = GEM(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(x: Tensor, y: Tensor, task: int, spoil: bool) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if spoil:
            next(model.parameters()).grad[0, 0] = math.inf
        gem.observe(x, y, task)
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    batches = list(stream(3))
    for batch in batches[:-1]:
        step(*batch, spoil=False)
    before, last = weights(model), gem.last
    momentum = copy.deepcopy(optimizer.state_dict()["state"])
    step(*batches[-1], spoil=True)
    assert scaler.get_scale() == 512.0
    for a, b in zip(weights(model), before, strict=True):
        assert_same_bits(a, b)
    for name, state in optimizer.state_dict()["state"].items():
        assert_same_bits(state["momentum_buffer"], momentum[name]["momentum_buffer"])
    assert gem.last is last
    # What was seen was seen: the batch is in the memory, at the end.
    x, _ = gem.memory.examples(2)
    assert x[-len(batches[-1][0]) :].equal(batches[-1][0])
    step(*batches[-1], spoil=False)
    assert gem.last is not last


def test_a_step_inside_of_autocast_takes_the_memory_pass_out_of_it() -> None:
    rows = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model, optimizer, gem, loss = at_a_conflict()
        loss().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
        assert gem.last is not None
        rows.append(flat_grad(model))
    assert_same_bits(*rows)


def test_a_model_in_bfloat16() -> None:
    model, optimizer, gem, loss = at_a_conflict(torch.bfloat16)
    loss().backward()
    optimizer.step()
    assert gem.last is not None
    assert gem.last.violations.all()
    assert gem.last.status == 0
    assert flat_grad(model).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step_inside", [False, True])
@pytest.mark.parametrize("name", ["plain", "normalised", "converts its inputs"])
@pytest.mark.parametrize("rule", [GEM, AGEM])
def test_half_precision_parameters_with_float32_inputs(
    rule: type[GEM], name: str, step_inside: bool, dtype: torch.dtype
) -> None:
    """The pass over the memory computes what the user's own forward does, under autocast or without."""

    class Converting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_autocast_enabled("cpu")
            return self.net(x.to(dtype))

    layers = {"plain": [], "normalised": [nn.Linear(6, 6), nn.BatchNorm1d(6), nn.LayerNorm(6)]}
    model = Converting() if name == "converts its inputs" else nn.Sequential(*layers[name], mlp())
    model.to(dtype)
    optimizer = sgd(model)
    gem = rule(model, optimizer, memory=EpisodicMemory(per_task=8), margin=0.0)

    def autocast(inside: bool) -> torch.autocast:
        return torch.autocast("cpu", dtype=dtype, enabled=inside and name != "converts its inputs")

    for x, y, task in stream(3):
        optimizer.zero_grad()
        with autocast(True):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        gem.observe(x, y, task)
        g = flat_grad(model).double()
        statistics = [buffer.clone() for buffer in model.buffers()]
        if task == 1:
            x_past, y_past = gem.memory.examples(0)
            with autocast(True):
                expected = torch.autograd.grad(F.cross_entropy(model(x_past), y_past), list(model.parameters()))
            for buffer, value in zip(model.buffers(), statistics, strict=True):
                buffer.copy_(value)
        with autocast(step_inside):
            optimizer.step()
        if task == 1:
            assert gem.last is not None
            row = torch.cat([part.flatten() for part in expected]).double()
            assert gem.last.q.item() == pytest.approx((row @ g).item(), rel=0.02, abs=1e-4)
    assert gem.last is not None
    assert flat_grad(model).isfinite().all()


def test_half_precision_that_autocast_does_not_help_is_the_memorys_dtype() -> None:
    class NoAutocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.net(x)

    model = NoAutocast().bfloat16()
    optimizer = sgd(model)
    gem = GEM(model, optimizer)
    for x, y, task in stream(2):
        gem.observe(x, y, task)
    with pytest.raises(RuntimeError, match=r"must take the memory's examples, torch\.float32 on cpu, .* memory\.to"):
        optimizer.step()
    gem.memory.to(dtype=torch.bfloat16)
    optimizer.step()
    assert gem.last is not None


def test_autocast_in_the_forward_that_accelerate_prepares() -> None:
    model = mlp()
    optimizer = sgd(model)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        prepared, _ = accelerator.prepare(model, optimizer)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    gem = GEM(prepared, optimizer, memory=EpisodicMemory(per_task=16))
    dtypes: list[torch.dtype] = []
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    layer.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    for x, y, task in stream(2):
        optimizer.zero_grad()
        F.cross_entropy(prepared(x), y).backward()
        assert dtypes == [torch.bfloat16]
        gem.observe(x, y, task)
        dtypes.clear()
        forward = prepared.forward
        optimizer.step()
        assert prepared.forward == forward
        assert set(dtypes) == ({torch.float32} if task else set())
        dtypes.clear()
