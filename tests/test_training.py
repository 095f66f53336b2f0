"""What real training loops do around a step: mixed precision, accumulation, clipping, groups, freezing, conversion.

Each works or is refused with one sentence.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from utils.asserts import assert_same_bits
from utils.engines import loop
from utils.models import MultiHead, mlp, stream

from gem_fast import AGEM, GEM, EpisodicMemory

Batches = Iterable[tuple[Tensor, Tensor, object]]


def sgd(model: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, gem: GEM, batches: Batches) -> None:
    for x, y, task in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gem.observe(x, y, task)
        optimizer.step()


def flat_grad(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def at_a_conflict(
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, torch.optim.Optimizer, GEM, Callable[[], Tensor]]:
    """A model, its optimizer and hook, and a loss whose gradient raises the loss of the one past task."""
    model = mlp(dtype)
    optimizer = sgd(model)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=8))
    x, y = torch.randn(8, 6, dtype=dtype), torch.zeros(8, dtype=torch.long)
    gem.observe(x, y, "past")
    gem.observe(x, y + 1, "now")
    return model, optimizer, gem, lambda: F.cross_entropy(model(x), y + 1)


def past_gradient(model: nn.Module, gem: GEM) -> Tensor:
    batches, _ = gem.constraints()
    return loop(model)(batches, list(model.parameters())).G[0].clone()


# ---- mixed precision -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_refused_when_attached(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3, dtype=dtype))
    message = rf"parameters must be real numbers, got {dtype} for shape \(3, 8\); keep real and imaginary parts as two"
    for parameters in (model.parameters(), model[1].parameters()):
        with pytest.raises(ValueError, match=message):
            GEM(model, torch.optim.SGD(parameters, lr=0.1))
    real = torch.optim.SGD(model[0].parameters(), lr=0.1)
    assert GEM(model, real).attached


# ---- what happens to the gradient before and after -------------------------------------------------------------------


def test_accumulated_gradients_are_projected_as_one() -> None:
    batches = list(stream(3, dtype=torch.float64))
    results = []
    for parts in (1, 5):
        torch.manual_seed(0)
        model = mlp(torch.float64)
        optimizer = sgd(model)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=16))
        for x, y, task in batches:
            optimizer.zero_grad()
            for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(x_part), y_part) / parts).backward()
                gem.observe(x_part, y_part, task)
            optimizer.step()
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b)


def test_clipping_before_the_step_is_of_the_unprojected_gradient() -> None:
    model, optimizer, gem, loss = at_a_conflict(torch.float64)
    loss().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    g, g_past = flat_grad(model), past_gradient(model, gem)
    optimizer.step()
    assert gem.last is not None
    assert torch.allclose(gem.last.q, g_past[None] @ g)
    assert torch.allclose(flat_grad(model), g + gem.last.v[0] * g_past)


def test_clipping_after_the_projection_is_a_second_hook() -> None:
    model, optimizer, gem, loss = at_a_conflict(torch.float64)
    norms = []
    optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01).item())
    )
    loss().backward()
    g, g_past = flat_grad(model), past_gradient(model, gem)
    optimizer.step()
    assert gem.last is not None
    projected = g + gem.last.v[0] * g_past
    assert norms == [pytest.approx(projected.norm().item())]
    assert torch.allclose(flat_grad(model), projected * (0.01 / projected.norm()))
    assert flat_grad(model) @ g_past > 0  # a shorter step in the same direction raises no past loss either


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RMSprop", "Adagrad"])
def test_any_optimizer_takes_the_projected_gradient_as_its_own(name: str) -> None:
    """Its step is the one that it takes on a gradient projected by hand: decay, momentum and groups are its own."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        options = {"momentum": 0.9} if name == "SGD" else {}
        groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters(), "weight_decay": 0.1}]
        return getattr(torch.optim, name)(groups, lr=0.01, **options)

    model = mlp(torch.float64)
    twin = copy.deepcopy(model)
    optimizer, plain = make(model), make(twin)
    gem = GEM(model, optimizer)
    for x, y, task in stream(3, dtype=torch.float64):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gem.observe(x, y, task)
        optimizer.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        plain.step()
    assert gem.last is not None
    for a, b in zip(weights(model), weights(twin), strict=True):
        assert_same_bits(a, b)


def test_lbfgs_is_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"step needs no closure, got LBFGS: its closure computes new gradients"):
        GEM(model, torch.optim.LBFGS(model.parameters()))


# ---- models that change ----------------------------------------------------------------------------------------------


def test_layers_frozen_and_thawed() -> None:
    model = mlp()
    optimizer = sgd(model)
    gem = GEM(model, optimizer)
    batches = list(stream(6))
    for part, frozen in enumerate((False, True, False)):
        for p in model[0].parameters():
            p.requires_grad_(not frozen)
        before = weights(model[0])
        learn(model, optimizer, gem, batches[8 * part : 8 * part + 8])
        assert gem.last is not None
        assert all(a.equal(b) for a, b in zip(weights(model[0]), before, strict=True)) == frozen


def test_a_step_with_everything_frozen_does_nothing() -> None:
    model, optimizer, gem, loss = at_a_conflict()
    before = weights(model)
    model.requires_grad_(False)
    optimizer.step()
    assert gem.last is None
    assert all(a.equal(b) for a, b in zip(weights(model), before, strict=True))
    model.requires_grad_(True)
    loss().backward()
    optimizer.step()
    assert gem.last is not None


def test_parameters_added_in_the_middle() -> None:
    model = MultiHead(1)
    optimizer = sgd(model)
    gem = GEM(model, optimizer)
    for task in range(3):
        if task:
            model.heads.append(nn.Linear(8, 3))
            optimizer.add_param_group({"params": model.heads[task].parameters(), "lr": 0.05})
        before = weights(model)
        for x, y, _ in stream(1):
            optimizer.zero_grad()
            F.cross_entropy(model(x, task), (y + task) % 3).backward()
            gem.observe(x, y, task)
            optimizer.step()
        assert not weights(model.heads[task])[0].equal(before[-2])
    assert gem.last is not None
    assert gem.last.v.shape == (2,)


def test_a_model_converted_after_attaching() -> None:
    model = mlp()
    optimizer = sgd(model)
    gem = GEM(model, optimizer)
    learn(model, optimizer, gem, stream(2))
    model.double()
    before = weights(model)
    x, y, _ = next(stream(1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"dtype and device of the task's earlier examples.*float32.*float64"):
        gem.observe(x, y, 1)
    with pytest.raises(
        RuntimeError, match=r"examples, torch.float32 on cpu, .* parameters of torch.float64 on cpu; .* memory\.to"
    ):
        learn(model, optimizer, gem, [(x, y, "new")])
    assert all(a.equal(b) for a, b in zip(weights(model), before, strict=True))
    assert gem.memory.to(dtype=torch.float64) is gem.memory
    learn(model, optimizer, gem, [(x, y, 1), (x, y, "new")])
    assert gem.last is not None


def test_memory_to_converts_what_is_floating() -> None:
    memory = EpisodicMemory(per_task=3)
    memory.observe(torch.randn(2, 4), torch.arange(2), 0)
    x, y = (value.clone() for value in memory.examples(0))
    memory.to(device="cpu", dtype=torch.float64)
    assert memory.examples(0)[0].equal(x.double())
    assert_same_bits(memory.examples(0)[1], y)
    with pytest.raises(TypeError, match=r"dtype must be a floating-point one, got torch\.int64"):
        memory.to(dtype=torch.int64)


def test_an_error_of_the_models_own_stays_its_own() -> None:
    _, optimizer, gem, loss = at_a_conflict()
    loss().backward()
    gem.memory.observe(torch.randn(2, 7), torch.zeros(2, dtype=torch.long), "of another shape")
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        optimizer.step()


def test_mixed_dtypes_are_refused() -> None:
    mixed = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3).bfloat16())
    message = (
        r"must all have one dtype and device, got torch.float32 on cpu for shape \(8, 6\) and torch.bfloat16 on cpu "
        r"for shape \(3, 8\)"
    )
    with pytest.raises(ValueError, match=message):
        GEM(mixed, sgd(mixed))
    model, optimizer, _, _ = at_a_conflict()
    model[2].bfloat16()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(a.equal(b) for a, b in zip(weights(model), before, strict=True))


def test_no_warnings_in_an_ordinary_loop() -> None:
    model = mlp()
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        gem = GEM(model, optimizer)
        learn(model, optimizer, gem, stream(2))
        schedule.step()
    assert [str(warning.message) for warning in caught] == []
    assert gem.last is not None
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize(
    ("model", "optimizer", "message"),
    [
        ("mlp", sgd(mlp()), "model must be a torch.nn.Module, got str"),
        (mlp(), "sgd", "optimizer must be a torch.optim.Optimizer, got str"),
    ],
)
def test_bad_types(model, optimizer, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        GEM(model, optimizer)
