"""gem.step: a whole step in one call, equal to the training loop that it stands for."""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from utils.models import CASES, MultiHead, case, conv, mlp, stream
from utils.training import train
from utils.waiting import waiting_raises

from gem_fast import AGEM, GEM, Batch, EpisodicMemory, Fused, Loop, ReservoirMemory
from gem_fast.gradients import cpu_mlp
from gem_fast.gradients.fused.joint import Joint
from gem_fast.gradients.fused.model import LayerPass
from gem_fast.gradients.interface import JointPass

pytestmark = pytest.mark.usefixtures("one_thread")

Examples = tuple[Any, Any, Any]


class Result(NamedTuple):
    losses: Tensor
    parameters: list[Tensor]
    buffers: list[Tensor]
    random_state: Tensor
    gem: GEM


@pytest.fixture
def joint() -> Iterator[list[str]]:
    """What each mini-batch went through the model with: "alone", by a shortcut, or "together" with the memory."""
    taken: list[str] = []
    by_shortcut, run, step_pass = Joint.by_shortcut, Joint.run, cpu_mlp.step_pass

    def noted_step_pass(*args: Any) -> JointPass:
        taken.append("together")
        return step_pass(*args)

    def noted_alone(self: Joint, *args: Any) -> Any:
        found = by_shortcut(self, *args)
        taken.extend(["alone"] * (found is not None))
        return found

    def noted(self: Joint, *args: Any) -> JointPass:
        found = run(self, *args)
        taken.append("together")
        return found

    with (
        mock.patch.object(Joint, "by_shortcut", noted_alone),
        mock.patch.object(Joint, "run", noted),
        mock.patch.object(cpu_mlp, "step_pass", noted_step_pass),
    ):
        yield taken


def trained(
    model: nn.Module,
    batches: list[Examples],
    *,
    by_step: bool,
    new_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    hook: type[GEM] = GEM,
    lr: float = 0.05,
    update_every: int = 1,
    **options: Any,
) -> Result:
    """Trains a copy of the model, by steps or by the loop."""
    model = copy.deepcopy(model)
    torch.manual_seed(5)
    optimizer = new_optimizer(model.parameters(), lr=lr)
    options = {"memory": EpisodicMemory(per_task=7), "loss_fn": F.cross_entropy, **options}
    gem = hook(model, optimizer, **options)
    losses = train(
        model,
        optimizer,
        gem,
        batches,
        by_step=by_step,
        loss_of=lambda x, y, task: gem.objective.loss(Batch(task, x, y)),
        update_every=update_every,
    )
    state = torch.get_rng_state()
    parameters, buffers = [p.detach() for p in model.parameters()], [b.clone() for b in model.buffers()]
    return Result(torch.stack(losses), parameters, buffers, state, gem)


def assert_same(model: nn.Module, batches: list[Examples], tolerance: float = 1e-9, **options: Any) -> Result:
    """Steps are the loop's, to rounding: losses, parameters, buffers, memory, random numbers, projections."""
    expected = trained(model, batches, by_step=False, **{k: copy.deepcopy(v) for k, v in options.items()})
    got = trained(model, batches, by_step=True, **options)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(got.losses, expected.losses, **close)
    torch.testing.assert_close(got.parameters, expected.parameters, **close)
    torch.testing.assert_close(got.buffers, expected.buffers, **close)
    assert torch.equal(got.random_state, expected.random_state)
    torch.testing.assert_close(got.gem.memory.state_dict(), expected.gem.memory.state_dict(), rtol=0, atol=0)
    assert torch.equal(got.gem.generators.cpu.get_state(), expected.gem.generators.cpu.get_state())
    assert (got.gem.last is None) == (expected.gem.last is None)
    if got.gem.last is not None and expected.gem.last is not None:
        torch.testing.assert_close(got.gem.last.v, expected.gem.last.v, rtol=1e-3, atol=1e-3)
    assert not any(p.grad is not None and p.grad.requires_grad for p in got.gem.objective.model.parameters())
    return got


def batches_of(name: str, dtype: torch.dtype, tasks: int = 3, steps: int = 3) -> tuple[nn.Module, list[Examples], Any]:
    model, inputs, targets, loss_fn = case(name)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    batches = [(cast(inputs(3)), cast(targets(3)), task) for task in range(tasks) for _ in range(steps)]
    return model.to(dtype), batches, loss_fn


@pytest.mark.parametrize("sampled", [None, 3, 4], ids=["exact", "as many", "more"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop_on_every_architecture(name: str, sampled: int | None) -> None:
    model, batches, loss_fn = batches_of(name, torch.float64)
    assert_same(model, batches, loss_fn=loss_fn, memory_batch=sampled, engine=Fused(tasks_per_pass=8), tolerance=1e-7)


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def doubles(tasks: int = 3) -> list[Examples]:
    return list(stream(tasks, dtype=torch.float64))


@pytest.mark.parametrize("memory_batch", [None, 3, 5])
@pytest.mark.parametrize(
    ("new_model", "way", "of_sample"),
    [(mlp, "alone", "either"), (smooth, None, "together"), (normalised, None, "together"), (conv, None, None)],
)
@pytest.mark.parametrize("new_optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_which_way_a_mini_batch_goes(
    joint: list[str],
    new_model: Any,
    way: str | None,
    of_sample: str | None,
    memory_batch: int | None,
    new_optimizer: Any,
) -> None:
    """By a shortcut through layers that one knows, with a sample of the memory through others, else by autograd."""
    wanted = way if memory_batch is None else of_sample
    assert_same(new_model().double(), doubles(), memory_batch=memory_batch, new_optimizer=new_optimizer, tolerance=1e-7)
    # In the first task's steps there is no past task.
    if wanted == "either":  # in the pass over few examples, but where a comparison is due
        assert len(joint) == 8
        assert "together" in joint or memory_batch == 5
        assert "alone" in joint
    else:
        assert joint == ([] if wanted is None else [wanted] * 8)


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=3, max_size=8),
    memory_batch=st.one_of(st.none(), st.integers(1, 7)),
    margin=st.sampled_from([0.0, 0.5]),
    update_every=st.integers(1, 3),
    model=st.sampled_from([mlp, smooth]),
)
def test_any_sizes(sizes: list[int], memory_batch: int | None, margin: float, update_every: int, model: Any) -> None:
    batches = [(torch.randn(n, 6).double(), torch.randint(3, (n,)), task) for task in range(3) for n in sizes]
    assert_same(
        model().double(), batches, memory_batch=memory_batch, margin=margin, update_every=update_every, tolerance=1e-7
    )


@pytest.mark.parametrize(
    "engine", [Loop(), Fused(form="layerwise"), Fused(refresh_every=2)], ids=lambda e: repr(e)[:30]
)
@pytest.mark.parametrize("memory_batch", [None, 3])
@pytest.mark.parametrize("new_model", [mlp, smooth])
def test_engines(engine: Any, memory_batch: int | None, new_model: Any) -> None:
    assert_same(new_model().double(), doubles(), memory_batch=memory_batch, engine=engine, tolerance=1e-7)


def test_averaged_gem() -> None:
    assert_same(smooth().double(), doubles(), hook=AGEM, memory_batch=5, tolerance=1e-7)


@pytest.mark.parametrize("memory", [ReservoirMemory(per_task=6), EpisodicMemory(total=12)], ids=["reservoir", "total"])
def test_memories(memory: Any) -> None:
    assert_same(smooth().double(), doubles(), memory=memory, memory_batch=3, tolerance=1e-7)


def test_current_heads() -> None:
    assert_same(MultiHead().double(), doubles(), tolerance=1e-7)


@pytest.mark.parametrize("memory_batch", [None, 3])
def test_nests(memory_batch: int | None, joint: list[str]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.b(torch.tanh(self.a(x)) * scale), "features": x}

    batches = [({"x": x, "scale": x[:, :1]}, {"y": y}, task) for x, y, task in doubles()]
    assert_same(
        Two().double(),
        batches,
        loss_fn=lambda output, y: F.cross_entropy(output["logits"], y["y"]),
        memory_batch=memory_batch,
        tolerance=1e-7,
    )
    assert joint == (["together"] * 8 if memory_batch else [])


def test_texts_of_other_lengths_are_not_padded_to_those_of_the_memory(joint: list[str]) -> None:
    """A model without a mask would see the padding: such a mini-batch goes alone."""
    model = nn.Sequential(nn.Embedding(9, 4), Mean(), nn.Linear(4, 3)).double()
    batches = [(torch.randint(1, 9, (3, 4 + i % 3)), torch.randint(3, (3,)), i // 4) for i in range(12)]
    assert_same(model, batches, memory=EpisodicMemory(per_task=6, pad=0), memory_batch=3, tolerance=1e-7)
    assert 0 < len(joint) < 8


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_targets_that_are_ignored(joint: list[str]) -> None:
    batches = [(x, torch.where(torch.arange(len(y)) == 1, -100, y), task) for x, y, task in doubles()]
    for new_model in (mlp, smooth):
        assert_same(new_model().double(), batches, memory_batch=3, tolerance=1e-7)
    assert joint == ["together"] * 8 or joint == ["together"] * 16


# ---- what only a backward of the user's would do ---------------------------------------------------------------------


def look(model: nn.Module, seen: list[Any]) -> None:
    model[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))


def on_gradient(model: nn.Module, seen: list[Any]) -> None:
    model[0].weight.register_hook(lambda grad: seen.append(float(grad.sum())))


def after_accumulation(model: nn.Module, seen: list[Any]) -> None:
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.sum())))


@pytest.mark.parametrize("watch", [look, on_gradient, after_accumulation])
@pytest.mark.parametrize("new_model", [mlp, smooth])
def test_who_looks_into_the_model_sees_the_mini_batch_alone(new_model: Any, watch: Any, caplog: Any) -> None:
    seen: dict[bool, list[Any]] = {False: [], True: []}
    for by_step in (False, True):
        torch.manual_seed(0)
        model = new_model().double()
        watch(model, seen[by_step])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=7), memory_batch=3)
        train(model, optimizer, gem, doubles(), by_step=by_step)
    assert seen[True] == pytest.approx(seen[False])


def test_parameters_of_another_optimizer_get_their_gradients() -> None:
    model = smooth().double()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=7), memory_batch=3)
    for x, y, task in doubles():
        gem.step(x, y, task)
        assert all(p.grad is not None for p in model.parameters())


def test_an_engine_that_changes_what_fused_computes(joint: list[str]) -> None:
    class Halved(Fused):
        def __call__(self, *args: Any) -> Any:
            G = super().__call__(*args)
            G.G.mul_(0.5)
            return G

    assert_same(smooth().double(), doubles(), engine=Halved(form="rows"), memory_batch=3, tolerance=1e-7)
    assert joint == []


def test_a_model_that_mixes_examples_goes_alone(joint: list[str]) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(torch.tanh(x - x.mean(0)))

    assert_same(Mixing().double(), doubles(), memory_batch=3, tolerance=1e-7)
    assert joint == []


# ---- the optimizer's step --------------------------------------------------------------------------------------------


def test_one_step_and_one_projection(joint: list[str]) -> None:
    model = smooth().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, after = [], []
    optimizer.register_step_pre_hook(lambda *_: before.append([p.grad.clone() for p in model.parameters()]))
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=7), memory_batch=3)
    optimizer.register_step_pre_hook(lambda *_: after.append([p.grad.clone() for p in model.parameters()]))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    changed = 0
    for x, y, task in doubles():
        gem.step(x, y, task)
        schedule.step()
        violated = gem.last is not None and bool(gem.last.violations.any())
        same = all(map(torch.equal, before[-1], after[-1]))
        assert same == (not violated)
        changed += not same
    assert len(before) == len(after) == 12
    assert changed
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**4)


def test_gradients_of_calls_without_an_update_add_up() -> None:
    for new_model in (mlp, smooth):
        assert_same(new_model().double(), doubles(), update_every=2, memory_batch=3, tolerance=1e-7)


def test_the_users_own_step_ends_an_accumulation() -> None:
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=7))
    [(x, y, _), *_] = doubles()
    gem.step(x, y, 0, update=False)
    optimizer.step()
    gem.step(x, y, 0, update=False)
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("new_model", [mlp, smooth])
def test_scaler_and_autocast(new_model: Any, enabled: bool) -> None:
    results = []
    for step in (False, True):
        torch.manual_seed(0)
        model = new_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=7), memory_batch=3)
        # The first steps' gradients are infinite, so that the scaler skips them.
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**24, growth_interval=2)
        for x, y, task in stream(3):
            with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
                if step:
                    gem.step(x, y, task, scaler=scaler)
                    continue
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            gem.observe(x, y, task)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() < 2.0**24
        results.append(([p.detach() for p in model.parameters()], scaler.get_scale()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_wrapper_around_the_optimizer_steps() -> None:
    class Counting:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.steps = optimizer, 0

        @property
        def param_groups(self) -> Any:
            return self.optimizer.param_groups

        def zero_grad(self) -> None:
            self.optimizer.zero_grad()

        def step(self) -> None:
            self.steps += 1
            self.optimizer.step()

    model = mlp().double()
    wrapper = Counting(torch.optim.SGD(model.parameters(), lr=0.1))
    gem = GEM(model, wrapper, memory=EpisodicMemory(per_task=7))  # type: ignore[arg-type]
    for x, y, task in doubles():
        gem.step(x, y, task)
    assert wrapper.steps == 12
    wrapper.scaler = object()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="step must get losses that only it scales, got Counting with a scaler"):
        gem.step(*doubles()[0])


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_not_finite(joint: list[str]) -> None:
    for new_model in (mlp, smooth):
        model = new_model().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=7), memory_batch=3)
        *rest, (x, y, task) = doubles()
        for batch in rest:
            gem.step(*batch)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="grads must be finite, got a NaN or an infinity"):
            gem.step(x * float("nan"), y, task)
        assert all(map(torch.equal, before, (p.detach() for p in model.parameters())))


def test_detached() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    gem.detach()
    with pytest.raises(RuntimeError, match="step must be called on a hook that is attached, got a detached one"):
        gem.step(torch.randn(2, 6), torch.tensor([0, 1]), 0)


def test_an_optimizer_that_nobody_keeps() -> None:
    model = mlp()
    gem = GEM(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="got one whose optimizer is gone; keep the optimizer in a variable"):
        gem.step(torch.randn(2, 6), torch.tensor([0, 1]), 0)


@pytest.mark.parametrize("new_model", [mlp, smooth])
def test_a_wrong_pass_is_noticed_and_left(new_model: Any, joint: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """A comparison finds what the pass did to the mini-batch's gradient; the step is then the loop's."""
    alone_pass, write = cpu_mlp.alone_pass, LayerPass.write

    def wrong_alone(*args: Any) -> Any:
        grads, loss = alone_pass(*args)
        return [None if grad is None else 1.1 * grad for grad in grads], loss

    def wrong_row(self: LayerPass, G: Tensor, parameters: Any) -> None:
        write(self, G, parameters)
        if self.contributions[0].tasks.sizes[-1] == 5 and len(G) > 1:  # the mini-batch's, but no sample's
            G[-1] *= 1.1

    with (
        caplog.at_level(logging.WARNING, "gem_fast"),
        mock.patch.object(cpu_mlp, "alone_pass", wrong_alone),
        mock.patch.object(LayerPass, "write", wrong_row),
    ):
        assert_same(new_model().double(), doubles(), memory_batch=3, tolerance=1e-7)
    assert joint == []
    assert caplog.messages == []


@pytest.mark.cuda
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("in_one_call", [False, True], ids=["hook", "step"])
@pytest.mark.parametrize("memory_batch", [None, 3])
def test_a_gpu_is_never_waited_for(cuda_graph: bool, in_one_call: bool, memory_batch: int | None) -> None:
    """torch itself raises where an operator synchronises; but where a task joins, and where comparisons are due."""
    model = mlp().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=6), memory_batch=memory_batch, cuda_graph=cuda_graph)
    for task in range(3):
        for i in range(40):
            x, y = torch.randn(4, 6, device="cuda"), torch.randint(3, (4,), device="cuda")
            # Comparisons are due when a task joins, and in pass 32 and 64: of 40 passes before, and this task's 24th.
            may_wait = task < 2 or i < 10 or i >= 23
            with waiting_raises(not may_wait):
                train(model, optimizer, gem, [(x, y, task)], by_step=in_one_call)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
