"""FusedTaskGradients on whole models: the rows, buffers and errors of LoopTaskGradients."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from utils.engines import assert_as_the_loop, assert_rows_close, assert_untouched, log_lines, memory, trained
from utils.forwards import LOOPED, WAYS, Net
from utils.models import CASES, MultiHead, Residual, Transformer, case, classes, images, mlp, rows, sequences, tokens

from gem_fast import FusedTaskGradients, LoopTaskGradients
from gem_fast.paper.models import resnet18
from gem_fast.task_gradients import Batch, Sample

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (4, 3, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop(name: str, training: bool, dtype: torch.dtype) -> None:
    model, inputs, targets, loss_fn = case(name)
    model = model.to(dtype).train(training)
    batches = memory(SIZES, inputs, targets, dtype)
    assert_as_the_loop(model, batches, loss_fn, pass_task=name == "multi-head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_loop_on_the_resnet18_of_the_paper(training: bool, dtype: torch.dtype) -> None:
    model = resnet18(100, maps=20).to(dtype).train(training)
    batches = memory((2, 3, 2), lambda n: torch.randn(n, 3, 32, 32), lambda n: torch.randint(100, (n,)), dtype)
    # 20 layers of batch normalisation over few examples make more of float32's rounding than one layer does.
    assert_as_the_loop(model, batches, tolerance=1e-10 if dtype == torch.float64 else 1e-3)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["mlp", "residual", "transformer, positions first", "multi-head"]),
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=6),
    tasks_per_pass=st.one_of(st.none(), st.integers(1, 7)),
    memory_bytes=st.sampled_from([1, 10_000, 100_000, 2**30]),
    sampled=st.booleans(),
)
def test_any_numbers_of_tasks_and_examples(
    name: str, sizes: list[int], tasks_per_pass: int | None, memory_bytes: int, sampled: bool
) -> None:
    model, inputs, targets, loss_fn = case(name)
    batches = memory(sizes, inputs, targets)
    sample = None
    if sampled:
        # The first two examples of each task, the last one in front.
        starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
        sample = Sample((starts[:, None] + torch.tensor([1, 0])).flatten(), [2] * len(sizes))
    options = {"memory_bytes": memory_bytes}
    if tasks_per_pass is not None:
        options["tasks_per_pass"] = tasks_per_pass
    assert_as_the_loop(
        model.double(), batches, loss_fn, pass_task=name == "multi-head", sample=sample, tolerance=1e-9, **options
    )


@pytest.mark.parametrize(("option", "unit"), [("tasks_per_pass", "task"), ("memory_bytes", "byte")])
def test_limits_must_be_positive(option: str, unit: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1 {unit}, got 0"):
        FusedTaskGradients(mlp(), F.cross_entropy, **{option: 0})


def test_writes_into_the_rows_that_it_is_given() -> None:
    model = mlp(torch.float64)
    batches = memory(SIZES, rows, classes)
    engine = FusedTaskGradients(model, F.cross_entropy)
    expected = engine(batches, trained(model)).G
    p = expected.shape[1]
    for wide, out in (
        (w := torch.full((8, p + 3), 7.0, dtype=torch.float64), w[1::2, 1 : p + 1]),
        (w := torch.full((6, p), 7.0, dtype=torch.float64), w[1:5]),
    ):
        G = engine(batches, trained(model), out=out).G
        assert G.data_ptr() == out.data_ptr()
        assert out.equal(expected)
        assert (wide == 7).sum() == wide.numel() - out.numel()


# ---- losses ----------------------------------------------------------------------------------------------------------


def positions(n: int) -> Tensor:
    return torch.randint(3, (n, 4))


def partly_ignored(n: int) -> Tensor:
    return torch.cat([torch.randint(3, (n - 1,)), torch.tensor([-100])])


def distributions(n: int) -> Tensor:
    return torch.randn(n, 3).softmax(1)


def sliced(output: Tensor, target: Tensor) -> Tensor:
    """Targets 2 k and 2 k + 1 belong to task k, which has the outputs 2 k and 2 k + 1 of 8."""
    first = 2 * int(target[0] // 2)
    return F.cross_entropy(output[:, first : first + 2], target - first)


@pytest.mark.parametrize(
    ("loss_fn", "targets"),
    [
        (F.cross_entropy, distributions),
        (nn.CrossEntropyLoss(), classes),
        (nn.CrossEntropyLoss(), distributions),
        (F.cross_entropy, partly_ignored),
        (nn.CrossEntropyLoss(ignore_index=1), lambda n: torch.arange(n) % 3),
        (nn.CrossEntropyLoss(label_smoothing=0.1), classes),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double()), classes),
        (F.mse_loss, lambda n: torch.randn(n, 3)),
        (nn.SmoothL1Loss(), lambda n: torch.randn(n, 3)),
        (lambda output, target: F.cross_entropy(output, target) + output.square().mean(), classes),
    ],
)
@pytest.mark.parametrize("sizes", [(4, 4, 4), SIZES], ids=["equal", "ragged"])
def test_losses(loss_fn: Any, targets: Callable[[int], Tensor], sizes: tuple[int, ...]) -> None:
    assert_as_the_loop(mlp(torch.float64), memory(sizes, rows, targets), loss_fn)


@pytest.mark.parametrize("sizes", [(4, 4, 4), SIZES], ids=["equal", "ragged"])
@pytest.mark.parametrize("targets", [positions, lambda n: torch.where(torch.rand(n, 4) < 0.3, -100, positions(n))])
def test_cross_entropy_over_positions(targets: Callable[[int], Tensor], sizes: tuple[int, ...]) -> None:
    model = nn.Conv1d(4, 3, 3).double()
    assert_as_the_loop(model, memory(sizes, sequences, targets))


def test_per_task_slices_of_the_outputs() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 8)).double()
    batches = [[b._replace(y=2 * b.task + b.y % 2)] for [b] in memory(SIZES, rows, classes)]
    assert_as_the_loop(model, batches, sliced)


def test_loss_must_be_a_scalar() -> None:
    model = mlp()
    engine = FusedTaskGradients(model, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar, the mean over the examples, got shape \(4,\)"):
        engine(memory(SIZES, rows, classes, torch.float32), trained(model))
    assert_untouched(model)


# ---- ways in which models use their layers ---------------------------------------------------------------------------


def changed_in_place(net: Net, x: Tensor) -> Tensor:
    h = torch.tanh(net.norm(x))
    y = net.a(h)
    h.mul_(2)
    return net.b(y.relu_() + h)


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_use(way: str) -> None:
    net = Net(WAYS[way])
    if way == "one layer frozen":
        net.a.requires_grad_(False)
    assert_as_the_loop(net, memory(SIZES, rows, classes))


@pytest.mark.parametrize("way", LOOPED)
def test_what_cannot_be_fused_is_left_to_the_loop_and_says_why(way: str) -> None:
    reason, forward = LOOPED[way]
    assert_as_the_loop(Net(forward), memory(SIZES, rows, classes), fallback=reason)


def test_outputs_that_are_no_tensor_are_left_to_the_loop() -> None:
    net = Net(lambda net, x: {"logits": net.b(net.a(x))})
    batches = memory(SIZES, rows, classes)
    loss_fn: Any = lambda output, y: F.cross_entropy(output["logits"], y)  # noqa: E731
    assert_as_the_loop(net, batches, loss_fn, fallback="the model returns dict, not a tensor")


def test_an_input_changed_in_place_after_its_use_is_an_error_of_the_model_and_as_the_loops() -> None:
    net = Net(changed_in_place)
    batches = memory(SIZES, rows, classes)
    for engine in (LoopTaskGradients(net, F.cross_entropy), FusedTaskGradients(net, F.cross_entropy)):
        with log_lines() as lines, pytest.raises(RuntimeError, match="modified by an inplace operation"):
            engine(batches, trained(net))
        assert lines == []
        assert_untouched(net)


def test_models_that_change_their_input_in_place_are_left_to_the_loop() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    assert_as_the_loop(model, memory(SIZES, rows, classes), fallback="the model changes its input in place")


class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale)


def test_parameters_on_the_root_are_left_to_the_loop() -> None:
    batches = memory(SIZES, rows, classes)
    assert_as_the_loop(Rooted().double(), batches, fallback="parameters belong to Rooted itself")
    # Below the root the same module is called once per task.
    assert_as_the_loop(nn.Sequential(Rooted()).double(), batches)


def test_compiled_layers_are_left_to_the_loop_and_a_compiled_model_is_not() -> None:
    batches = memory(SIZES, rows, classes)
    model = mlp(torch.float64)
    model[0].compile(backend="eager")
    engine = FusedTaskGradients(model, F.cross_entropy)
    with log_lines() as lines:
        got = engine(batches, trained(model)).G
    assert ["Linear is compiled" in line for line in lines] == [True]
    plain = mlp(torch.float64)
    plain.load_state_dict(model.state_dict())
    assert_rows_close(got, LoopTaskGradients(plain, F.cross_entropy)(batches, trained(plain)).G, 1e-10)
    with log_lines() as lines:
        whole = FusedTaskGradients(torch.compile(plain, backend="eager"), F.cross_entropy)(batches, trained(plain)).G
    assert lines == []
    assert_rows_close(whole, got, 1e-10)


def test_hooks() -> None:
    batches = memory(SIZES, rows, classes)
    seen = []
    model = mlp(torch.float64)
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape) or output.sin())
    model[2].register_full_backward_hook(lambda module, into, out: (3 * into[0],))
    assert_as_the_loop(model, batches)
    assert len(seen) > 0
    hooked = mlp(torch.float64)
    engine = FusedTaskGradients(hooked, F.cross_entropy)
    engine(batches, trained(hooked))
    hooked[0].weight.register_hook(lambda grad: 2 * grad)
    with log_lines() as lines:
        got = engine(batches, trained(hooked)).G
    assert ["a parameter has a hook" in line for line in lines] == [True]
    assert got.equal(LoopTaskGradients(hooked, F.cross_entropy)(batches, trained(hooked)).G)


def test_wrapped_models() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    batches = memory(SIZES, rows, classes)
    assert_as_the_loop(Wrapper(mlp(torch.float64)), batches)
    assert_as_the_loop(Wrapper(MultiHead(4)).double(), batches, pass_task=True)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weights_made_in_a_hook_are_left_to_the_loop() -> None:
    model = mlp()
    torch.nn.utils.weight_norm(model[0])
    batches = memory(SIZES, rows, classes, torch.float32)
    engine = FusedTaskGradients(model, F.cross_entropy)
    with log_lines() as lines:
        got = engine(batches, trained(model)).G
    assert len(lines) == 1
    assert got.equal(LoopTaskGradients(model, F.cross_entropy)(batches, trained(model)).G)


# ---- what changes between steps --------------------------------------------------------------------------------------


def test_memory_changed_in_place_and_read_in_another_way() -> None:
    model = mlp(torch.float64)
    engine = FusedTaskGradients(model, F.cross_entropy)
    loop = LoopTaskGradients(model, F.cross_entropy)
    x, y = torch.randn(16, 6).double(), torch.randint(3, (16,))
    first, second = slice(0, 4), slice(8, 12)

    def check(*parts: slice) -> None:
        batches = [[Batch(k, x[part], y[part])] for k, part in enumerate(parts)]
        assert_rows_close(engine(batches, trained(model)).G, loop(batches, trained(model)).G, 1e-10)

    check(first, second)
    x[1] = 3.0
    check(first, second)
    y[9] = (y[9] + 1) % 3
    check(first, second)
    check(slice(0, 8, 2), second)  # as many examples from the same address on
    check(second, first)
    check(second, first, first)
    x = torch.randn(16, 6).double()
    check(first, second)


def test_targets_that_begin_to_be_ignored() -> None:
    model = mlp(torch.float64)
    batches = memory((4, 4), rows, classes)
    engine = assert_as_the_loop(model, batches)
    batches[1][0].y[2] = -100
    expected = LoopTaskGradients(model, F.cross_entropy)(batches, trained(model)).G
    assert_rows_close(engine(batches, trained(model)).G, expected, 1e-10)


def test_layers_frozen_thawed_replaced_and_switched_over() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    batches = memory(SIZES, rows, classes)
    engine = FusedTaskGradients(model, F.cross_entropy)

    def check() -> None:
        twin = copy.deepcopy(model)
        expected = LoopTaskGradients(twin, F.cross_entropy)(batches, trained(twin))
        with log_lines() as lines:
            got = engine(batches, trained(model))
        assert lines == []
        assert_rows_close(got.G, expected.G, 1e-10)
        for mine, right in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.allclose(mine, right, rtol=1e-12)

    model[2].eval()
    check()
    model[0].requires_grad_(False)
    check()
    model[0].requires_grad_(True)
    check()
    model[0] = nn.Linear(6, 8, bias=False).double()
    check()
    model[0].weight = nn.Parameter(torch.randn(8, 6).double())
    check()
    model.eval()
    check()
    model.append(nn.LayerNorm(3).double())
    check()


def test_two_engines_and_two_models_do_not_meet() -> None:
    batches = memory(SIZES, rows, classes)
    models = [mlp(torch.float64), mlp(torch.float64)]
    engines = [FusedTaskGradients(model, F.cross_entropy) for model in (*models, models[0])]
    for _ in range(2):
        for engine, model in zip(engines, (*models, models[0]), strict=True):
            expected = LoopTaskGradients(model, F.cross_entropy)(batches, trained(model)).G
            assert_rows_close(engine(batches, trained(model)).G, expected, 1e-10)


def test_parameters_in_any_order_and_only_some_of_them() -> None:
    model = Residual().double()
    batches = memory((3, 3), images, classes)
    engine = FusedTaskGradients(model, F.cross_entropy, tasks_per_pass=2)
    parameters = list(model.parameters())
    for some in (parameters[::-1], parameters[3:6], parameters[:1]):
        twin = copy.deepcopy(model)
        names = {id(p): name for name, p in model.named_parameters()}
        theirs = dict(twin.named_parameters())
        expected = LoopTaskGradients(twin, F.cross_entropy)(batches, [theirs[names[id(p)]] for p in some]).G
        assert_rows_close(engine(batches, some).G, expected, 1e-10)


def test_a_new_way_of_calling_layers_is_left_to_the_loop_with_exact_running_statistics() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.twice = False

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(self.norm(x))
            return self.b(self.a(h) if self.twice else h)

    model = Sometimes().double()
    batches = memory(SIZES, rows, classes)
    engine = FusedTaskGradients(model, F.cross_entropy)
    engine(batches, trained(model))
    model.twice = True
    twin = copy.deepcopy(model)
    expected = LoopTaskGradients(twin, F.cross_entropy)(batches, trained(twin)).G
    with log_lines() as lines:
        got = engine(batches, trained(model)).G
    assert ["Linear is called in a way that was not verified" in line for line in lines] == [True]
    assert got.equal(expected)
    for mine, right in zip(model.buffers(), twin.buffers(), strict=True):
        assert mine.equal(right)


def test_buffers_that_only_a_pass_per_task_leaves_right() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    model = nn.Sequential(Counting(), nn.Linear(6, 3)).double()
    assert_as_the_loop(model, memory(SIZES, rows, classes), fallback="the buffer 0.calls is not left as by one pass")


def test_gradients_that_are_not_finite_give_up_nothing() -> None:
    model = mlp(torch.float64)
    engine = FusedTaskGradients(model, F.cross_entropy)
    batches = memory(SIZES, rows, classes)
    broken = [[b._replace(x=b.x * float("nan"))] for [b] in batches]
    with log_lines() as lines:
        assert engine(broken, trained(model)).G.isnan().any(1).all()
        engine(batches, trained(model))
    assert lines == []
    assert not engine._plan.given_up


# ---- no trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 1, 5])
def test_an_exception_in_the_model_comes_through_and_leaves_no_trace(where: int) -> None:
    class Failing(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > where:
                raise KeyError("no such thing")
            return x

    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Failing(), nn.Linear(8, 3)).double()
    engine = FusedTaskGradients(model, F.cross_entropy)
    batches = memory(SIZES, rows, classes)
    state = torch.get_rng_state()
    for _ in range({0: 0, 1: 0, 5: 2}[where]):  # 0, 1: in the first pass, of the loop and fused; 5: in the last one
        engine(batches, trained(model))
    with log_lines() as lines, pytest.raises(KeyError, match="no such thing"):
        engine(batches, trained(model))
    assert lines == []
    assert torch.get_rng_state().equal(state)
    assert_untouched(model)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_modes_and_random_numbers_are_as_they_were(training: bool) -> None:
    model = Transformer(dropout=0.3).double().train(training)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    batches = memory(SIZES, tokens, classes)
    engine = FusedTaskGradients(model, F.cross_entropy)
    state = torch.get_rng_state()
    with torch.no_grad():
        engine(batches, trained(model))
        engine(batches, trained(model))
    assert torch.get_rng_state().equal(state)
    assert all(module.training == training for module in model.modules())
    assert all(p.grad.equal(g) for p, g in zip(model.parameters(), before, strict=True))


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_dropout_has_the_same_distribution(name: str) -> None:
    """Means and variances of each row over many draws, in units of their standard errors."""
    if name == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.4), nn.Linear(4, 3)).double()
        batches = memory((4, 3), rows, classes)
    else:
        model, batches = Transformer(dropout=0.2).double(), memory((3, 3), tokens, classes)
    draws = 200
    samples = []
    for engine in (FusedTaskGradients(model, F.cross_entropy), LoopTaskGradients(model, F.cross_entropy)):
        drawn = []
        with log_lines() as lines:
            for k in range(draws):
                torch.manual_seed(k)
                drawn.append(engine(batches, trained(model)).G.clone())
        assert lines == []
        samples.append(torch.stack(drawn))
    for moment in (lambda x: x, lambda x: (x - x.mean(0)).square()):
        ours, theirs = (moment(sample) for sample in samples)
        error = ((ours.var(0) + theirs.var(0)) / draws).sqrt() + 1e-12
        z = (ours.mean(0) - theirs.mean(0)) / error
        assert z.square().mean() < 2
    assert (samples[0].var(0) > 0).any()


def test_dropout_that_drops_nothing_is_no_dropout() -> None:
    assert_as_the_loop(Transformer(dropout=0.0).double(), memory(SIZES, tokens, classes))
    assert_as_the_loop(Transformer(dropout=0.5).double().eval(), memory(SIZES, tokens, classes))
