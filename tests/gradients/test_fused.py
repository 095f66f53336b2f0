"""The fused pass on whole models: the rows, buffers and errors of the loop."""

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from utils.engines import (
    assert_as_the_loop,
    assert_rows_close,
    assert_untouched,
    fused,
    log_lines,
    loop,
    memory,
    trained,
    verifications,
)
from utils.forwards import LOOPED, Net
from utils.models import MultiHead, Residual, Transformer, classes, images, mlp, rows, tokens

from gem_fast import Batch, Fused, Objective

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (4, 3, 4, 5)


@pytest.mark.parametrize(
    ("option", "unit"),
    [("tasks_per_pass", "task"), ("activation_bytes", "byte"), ("row_bytes", "byte"), ("refresh_every", "step")],
)
def test_limits_must_be_positive(option: str, unit: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1 {unit}, got 0"):
        Fused(**{option: 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "columns"}, 'form must be "auto", "rows" or "layerwise", got \'columns\''),
        (
            {"form": "layerwise", "refresh_every": 2},
            'refresh_every must be 1 with form="layerwise", which keeps no rows',
        ),
        (
            {"form": "layerwise", "tasks_per_pass": 2},
            'tasks_per_pass must be None with form="layerwise", which needs all',
        ),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fused(**options)


@pytest.mark.parametrize(("row_bytes", "is_rows"), [(4 * 83 * 8, True), (4 * 83 * 8 - 1, False)])
def test_rows_that_do_not_fit_are_not_formed(row_bytes: int, is_rows: bool) -> None:
    model = mlp(torch.float64)
    assert sum(p.numel() for p in model.parameters()) == 83
    engine, objective = Fused(row_bytes=row_bytes), Objective(model, F.cross_entropy)
    G = engine(objective, memory(SIZES, rows, classes), trained(model))
    assert hasattr(G, "G") == is_rows
    # One task that is too large, or a model that needs the loop, goes on as well as it can.
    single = engine(objective, memory((4,), rows, classes), trained(model))
    assert single.depends == [True] * 4
    mixing = Net(LOOPED["mixes examples"][1])
    with log_lines() as lines:
        G = Fused(row_bytes=1)(Objective(mixing, F.cross_entropy), memory(SIZES, rows, classes), trained(mixing))
    assert len(lines) == 1
    assert_rows_close(G.G, loop(mixing)(memory(SIZES, rows, classes), trained(mixing)).G[:, :], 10)


# ---- what is left to the loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", LOOPED)
def test_what_cannot_be_fused_is_left_to_the_loop_and_says_why(way: str) -> None:
    reason, forward = LOOPED[way]
    assert_as_the_loop(Net(forward), memory(SIZES, rows, classes), fallback=reason)


def changed_in_place(net: Net, x: Tensor) -> Tensor:
    h = torch.tanh(net.norm(x))
    y = net.a(h)
    h.mul_(2)
    return net.b(y.relu_() + h)


def test_an_input_changed_in_place_after_its_use_is_an_error_of_the_model_and_as_the_loops() -> None:
    net = Net(changed_in_place)
    batches = memory(SIZES, rows, classes)
    for engine in (loop(net, F.cross_entropy), fused(net, F.cross_entropy)):
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
    engine = fused(model)
    with log_lines() as lines:
        got = engine(batches, trained(model)).G
    assert ["Linear is compiled" in line for line in lines] == [True]
    plain = mlp(torch.float64)
    plain.load_state_dict(model.state_dict())
    assert_rows_close(got, loop(plain)(batches, trained(plain)).G, 1e-10)
    with log_lines() as lines:
        whole = fused(torch.compile(plain, backend="eager"))(batches, trained(plain)).G
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
    engine = fused(hooked, F.cross_entropy)
    engine(batches, trained(hooked))
    hooked[0].weight.register_hook(lambda grad: 2 * grad)
    with log_lines() as lines:
        got = engine(batches, trained(hooked)).G
    assert ["a parameter has a hook" in line for line in lines] == [True]
    assert got.equal(loop(hooked)(batches, trained(hooked)).G)


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
    engine = fused(model)
    with log_lines() as lines:
        got = engine(batches, trained(model)).G
    assert len(lines) == 1
    assert got.equal(loop(model)(batches, trained(model)).G)


# ---- what changes between steps --------------------------------------------------------------------------------------


def test_memory_changed_in_place_and_read_in_another_way() -> None:
    model = mlp(torch.float64)
    engine = fused(model)
    reference = loop(model)
    x, y = torch.randn(16, 6).double(), torch.randint(3, (16,))
    first, second = slice(0, 4), slice(8, 12)

    def check(*parts: slice) -> None:
        batches = [[Batch(k, x[part], y[part])] for k, part in enumerate(parts)]
        assert_rows_close(engine(batches, trained(model)).G, reference(batches, trained(model)).G, 1e-10)

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
    expected = loop(model)(batches, trained(model)).G
    assert_rows_close(engine(batches, trained(model)).G, expected, 1e-10)


def test_layers_frozen_thawed_replaced_and_switched_over() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    batches = memory(SIZES, rows, classes)
    engine = fused(model)

    def check() -> None:
        twin = copy.deepcopy(model)
        expected = loop(twin)(batches, trained(twin))
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
    engines = [fused(model) for model in (*models, models[0])]
    for _ in range(2):
        for engine, model in zip(engines, (*models, models[0]), strict=True):
            expected = loop(model)(batches, trained(model)).G
            assert_rows_close(engine(batches, trained(model)).G, expected, 1e-10)


def test_parameters_in_any_order_and_only_some_of_them() -> None:
    model = Residual().double()
    batches = memory((3, 3), images, classes)
    engine = fused(model, F.cross_entropy, tasks_per_pass=2)
    parameters = list(model.parameters())
    for some in (parameters[::-1], parameters[3:6], parameters[:1]):
        twin = copy.deepcopy(model)
        names = {id(p): name for name, p in model.named_parameters()}
        theirs = dict(twin.named_parameters())
        expected = loop(twin)(batches, [theirs[names[id(p)]] for p in some]).G
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
    engine = fused(model)
    engine(batches, trained(model))
    model.twice = True
    twin = copy.deepcopy(model)
    expected = loop(twin)(batches, trained(twin)).G
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
    engine = fused(model)
    batches = memory(SIZES, rows, classes)
    broken = [[b._replace(x=b.x * float("nan"))] for [b] in batches]
    with log_lines() as lines, verifications() as verified:
        assert engine(broken, trained(model)).G.isnan().any(1).all()
        assert verified == []
        engine(batches, trained(model))
    assert lines == []
    assert verified == [2]


# ---- no trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 1, 5, 13])
def test_an_exception_in_the_model_comes_through_and_leaves_no_trace(where: int) -> None:
    class Failing(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > where:
                raise KeyError("no such thing")
            return x

    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Failing(), nn.Linear(8, 3)).double()
    engine = fused(model)
    batches = memory(SIZES, rows, classes)
    state = torch.get_rng_state()
    # 0, 1: in the first comparison, of the loop and fused; 5: in the comparison of all rows; 13: in the third pass.
    for _ in range(2 if where == 13 else 0):
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
    engine = fused(model)
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
    for engine in (fused(model), loop(model)):
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


def test_no_pass_keeps_its_graph() -> None:
    """Where a layer's output is saved for the backward, as that of tanh is, a graph can hold itself."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3), nn.Softmax(1))
    engine, batches = Fused(form="rows"), memory(SIZES, rows, classes, torch.float32)
    gc.collect()
    before = graph_nodes()
    for _ in range(2):  # the first pass is verified
        engine(Objective(model, F.cross_entropy), batches, trained(model))
        gc.collect()
        assert graph_nodes() == before


def graph_nodes() -> int:
    return sum(type(x).__name__.endswith("Backward0") for x in gc.get_objects())
