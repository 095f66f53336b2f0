import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from utils.asserts import assert_same_bits
from utils.engines import loop
from utils.models import MultiHead, conv, mlp, stream
from utils.training import train

from gem_fast import AGEM, GEM, EpisodicMemory

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rule", [GEM, AGEM])
def test_the_optimizer_reads_a_gradient_that_raises_no_past_loss(name: str, rule: type[GEM]) -> None:
    model = mlp(torch.float64)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    gem = rule(model, optimizer, memory=EpisodicMemory(per_task=16), margin=0.0)
    engine = loop(model)
    projected = 0
    for x, y, task in stream(4, dtype=torch.float64):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gem.observe(x, y, task)
        rows = engine(gem.constraints()[0], list(model.parameters())).G.clone() if rule is GEM else None
        optimizer.step()
        if gem.last is None:
            assert task == 0
            continue
        projected += bool(gem.last.violations.any())
        g = torch.cat([p.grad.flatten() for p in model.parameters()])
        if rows is not None:
            assert (rows @ g >= -1e-9 * rows.norm(dim=1) * (1 + g.norm())).all()
    assert projected > 3


def test_first_task_is_plain_training() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    train(model, optimizer, GEM(model, optimizer), stream(1))
    for x, y, _ in stream(1):
        plain.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(p.data, q.data)


def test_constraints_come_from_all_tasks_but_the_current_one() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    for task, past in (("a", []), ("b", ["a"]), ("c", ["a", "b"]), ("a", ["b", "c"])):
        optimizer.zero_grad()
        x, y = torch.randn(4, 6), torch.randint(3, (4,))
        F.cross_entropy(model(x), y).backward()
        gem.observe(x, y, task)
        optimizer.step()
        assert gem.past_tasks == past
        assert (gem.last is None) == (past == [])
        assert gem.last is None or gem.last.v.shape == (len(past),)


def test_agem_is_its_closed_form() -> None:
    model = mlp(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gem = AGEM(model, optimizer, memory=EpisodicMemory(per_task=50), memory_batch=1000)
    for x, y, task in stream(3, dtype=torch.float64):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters()])
        gem.observe(x, y, task)
        optimizer.step()
        if gem.last is None:
            continue
        past = [gem.memory.examples(other) for other in gem.past_tasks]
        loss = F.cross_entropy(model(torch.cat([a for a, _ in past])), torch.cat([b for _, b in past]))
        ref = torch.cat([r.flatten() for r in torch.autograd.grad(loss, list(model.parameters()))])
        expected = g - torch.clamp(g @ ref, max=0) / (ref @ ref) * ref
        assert torch.allclose(torch.cat([p.grad.flatten() for p in model.parameters()]), expected, atol=1e-12)


def test_agem_draws_from_all_past_tasks_without_replacement() -> None:
    model = MultiHead(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = AGEM(model, optimizer, memory=EpisodicMemory(per_task=10), memory_batch=12)
    for task in range(3):
        gem.observe(torch.arange(10.0)[:, None].repeat(1, 6) + 10 * task, torch.zeros(10).long(), task)
    for _ in range(5):
        [batches], _ = gem.constraints()
        drawn = torch.cat([batch.x[:, 0] for batch in batches])
        assert len(drawn) == len(drawn.unique()) == 12
        assert all((batch.x // 10 == batch.task).all() for batch in batches)


@pytest.mark.parametrize("rule", [GEM, AGEM])
def test_multi_head_models(rule: type[GEM]) -> None:
    model = MultiHead(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = rule(model, optimizer, margin=0.5)
    train(model, optimizer, gem, stream(3), loss_of=lambda x, y, task: F.cross_entropy(model(x, task), y))
    # The last batch is of task 2: heads 0 and 1 have a gradient only where the projection gave them one.
    assert gem.last is not None
    has_part = bool(gem.last.v.any())
    for head, expected in ((0, has_part), (1, has_part), (2, True), (3, False)):
        assert (model.heads[head].weight.grad is not None) == expected


def test_missing_gradient_counts_as_zeros_and_is_created_by_the_projection() -> None:
    model = MultiHead(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gem = GEM(model, optimizer, margin=0.5)
    x, y = torch.randn(8, 6), torch.zeros(8).long()
    created = []
    for task, sign in ((0, 1), (1, 1), (1, -1)):
        optimizer.zero_grad()
        (sign * F.cross_entropy(model(x, task), y)).backward()
        # The body's gradient of task 0, with or against it.
        model.body.weight.grad = sign * torch.autograd.grad(F.cross_entropy(model(x, 0), y), model.body.weight)[0]
        gem.observe(x, y, task)
        optimizer.step()
        created.append(model.heads[0].weight.grad is not None)
    assert created == [True, False, True]


def test_state_resumes_with_the_same_bits() -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, GEM]:
        torch.manual_seed(0)
        model = conv()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, AGEM(model, optimizer, memory=EpisodicMemory(per_task=8), memory_batch=6)

    batches = list(stream(4))
    model, optimizer, gem = fresh()
    torch.manual_seed(5)
    train(model, optimizer, gem, batches[:9])
    file = io.BytesIO()
    rng = torch.get_rng_state()
    torch.save([model.state_dict(), optimizer.state_dict(), gem.state_dict(), rng], file)
    train(model, optimizer, gem, batches[9:])

    resumed, resumed_optimizer, resumed_gem = fresh()
    file.seek(0)
    states = torch.load(file, weights_only=True)
    for part, state in zip((resumed, resumed_optimizer, resumed_gem), states, strict=False):
        part.load_state_dict(state)
    torch.set_rng_state(states[3])
    train(resumed, resumed_optimizer, resumed_gem, batches[9:])
    for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert_same_bits(a, b)


def test_detached_hook_does_nothing() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    train(model, optimizer, gem, stream(1))
    gem.detach()
    train(model, optimizer, gem, stream(3))
    assert gem.last is None


def test_only_what_the_optimizer_trains_is_projected() -> None:
    model = mlp()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": [model[2].weight]}, {"params": [model[0].weight, model[0].bias]}], lr=0.1)
    gem = GEM(model, optimizer)
    train(model, optimizer, gem, stream(3))
    assert gem.last is not None
    assert gem.last.status == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_is_refused_before_the_step(bad: float) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    train(model, optimizer, gem, stream(2))
    before = copy.deepcopy(model.state_dict())
    next(model.parameters()).grad[0, 0] = bad
    with pytest.raises(RuntimeError, match="grads must be finite, got a NaN or an infinity"):
        optimizer.step()
    for a, b in zip(model.state_dict().values(), before.values(), strict=True):
        assert_same_bits(a, b)


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    for task in range(2):
        optimizer.zero_grad()
        x, y = torch.randint(5, (4, 2)), torch.randint(3, (4,))
        F.cross_entropy(model(x), y).backward()
        gem.observe(x, y, task)
        if task == 0:
            optimizer.step()
    with pytest.raises(
        TypeError, match=r"gradients must be dense, got a sparse one .* for a parameter of shape \(5, 4\)"
    ):
        optimizer.step()


def test_bad_arguments() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="model must have parameters, got a model without any"):
        GEM(nn.ReLU(), optimizer)
    with pytest.raises(ValueError, match="optimizer must hold parameters of the model"):
        GEM(model, other)
    with pytest.raises(ValueError, match="margin must be finite and not negative, got -1"):
        GEM(model, optimizer, margin=-1)
    with pytest.raises(ValueError, match="ridge must be finite and not negative, got nan"):
        GEM(model, optimizer, ridge=float("nan"))
    with pytest.raises(ValueError, match="memory_batch must be at least 1 example, got 0"):
        AGEM(model, optimizer, memory_batch=0)
    gem = GEM(model, optimizer)
    with pytest.raises(ValueError, match="x and y must have the same number of examples, got 2 and 3"):
        gem.observe(torch.zeros(2, 6), torch.zeros(3), 0)
    with pytest.raises(TypeError, match="task must be a hashable id"):
        gem.observe(torch.zeros(2, 6), torch.zeros(2), {})
    assert gem.memory.tasks == []
