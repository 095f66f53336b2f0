"""What real training loops do around a step: accumulation, clipping, groups, freezing, conversion.

Each works or is refused with one sentence.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from utils.asserts import assert_same_bits
from utils.engines import loop
from utils.models import MultiHead, mlp, stream
from utils.training import at_a_conflict, flat_grad, sgd, train, weights

from gem_fast import GEM, EpisodicMemory


def past_gradient(model: nn.Module, gem: GEM) -> Tensor:
    batches, _ = gem.constraints()
    return loop(model)(batches, list(model.parameters())).G[0].clone()


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
        train(model, optimizer, gem, batches[8 * part : 8 * part + 8])
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
    train(model, optimizer, gem, stream(2))
    model.double()
    before = weights(model)
    x, y, _ = next(stream(1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"dtype and device of the task's earlier examples.*float32.*float64"):
        gem.observe(x, y, 1)
    with pytest.raises(
        RuntimeError, match=r"examples, torch.float32 on cpu, .* parameters of torch.float64 on cpu; .* memory\.to"
    ):
        train(model, optimizer, gem, [(x, y, "new")])
    assert all(a.equal(b) for a, b in zip(weights(model), before, strict=True))
    assert gem.memory.to(dtype=torch.float64) is gem.memory
    train(model, optimizer, gem, [(x, y, 1), (x, y, "new")])
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
        train(model, optimizer, gem, stream(2))
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


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_refused_when_attached(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3, dtype=dtype))
    message = rf"parameters must be real numbers, got {dtype} for shape \(3, 8\); keep real and imaginary parts as two"
    for parameters in (model.parameters(), model[1].parameters()):
        with pytest.raises(ValueError, match=message):
            GEM(model, torch.optim.SGD(parameters, lr=0.1))
    real = torch.optim.SGD(model[0].parameters(), lr=0.1)
    assert GEM(model, real).attached
