"""LayerwiseGradients: G as an operator, by blocks of columns and by inner products of examples."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from utils.asserts import assert_same_bits
from utils.engines import assert_projects_as_rows, assert_untouched, fused, layerwise_by, log_lines, memory, trained
from utils.forwards import LOOPED, Net
from utils.models import MultiHead, Transformer, case, classes, mlp, rows, stream, tokens
from utils.training import train

from gem_fast import GEM, Engine, EpisodicMemory, Fused, Loop, Objective, project_
from gem_fast.gradients import layerwise
from gem_fast.gradients.fused.verifier import _row as one_row

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (4, 3, 4, 5)


@pytest.mark.parametrize("t", [1, 2, 7])
@pytest.mark.parametrize("name", ["mlp", "transformer, tied", "multi-head"])
def test_numbers_of_tasks(name: str, t: int) -> None:
    model, inputs, targets, loss_fn = case(name)
    batches = memory((3,) * t, inputs, targets)
    assert_projects_as_rows(model.double(), batches, loss_fn, pass_task=name == "multi-head")


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    positions=st.sampled_from([(), (3,), (2, 2)]),
    calls=st.integers(1, 2),
    seed=st.integers(0, 3),
)
def test_linear_layers_of_any_size(
    sizes: list[int], widths: tuple[int, int], positions: tuple[int, ...], calls: int, seed: int
) -> None:
    torch.manual_seed(seed)

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(widths[0], widths[1]), nn.Linear(widths[1], widths[1])
            self.head = nn.Linear(widths[1], 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            for _ in range(calls):
                h = torch.tanh(self.second(h))
            return self.head(h.flatten(1, -2).mean(1) if positions else h)

    batches = memory(sizes, lambda n: torch.randn(n, *positions, widths[0]), classes)
    assert_projects_as_rows(Layers().double(), batches, tolerance=1e-9)


def test_a_memory_of_mostly_zeros() -> None:
    model = nn.Sequential(nn.Linear(100, 20), nn.Tanh(), nn.Linear(20, 3))
    batches = memory((30, 25, 30), lambda n: torch.relu(torch.randn(n, 100) - 1.5), classes, torch.float32)
    assert_projects_as_rows(model, batches, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision(dtype: torch.dtype) -> None:
    batches = memory(SIZES, tokens, classes, dtype)
    assert_projects_as_rows(Transformer().to(dtype), batches, tolerance=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("way", LOOPED)
def test_models_that_need_the_loop_are_refused(way: str) -> None:
    reason, forward = LOOPED[way]
    model = Net(forward)
    objective = Objective(model, F.cross_entropy)
    with (
        log_lines() as lines,
        pytest.raises(RuntimeError, match=f'form="layerwise" takes a model.*{reason}.*take "rows"'),
    ):
        Fused(form="layerwise")(objective, memory(SIZES, rows, classes), list(model.parameters()))
    assert lines == []
    assert_untouched(model)


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["row", "gradient", "unused gradient"])
def test_values_that_are_not_finite(where: str, value: float, products: bool) -> None:
    model = MultiHead(5).double()
    batches = memory(SIZES, rows, classes)
    parameters = list(model.parameters())
    grads = [torch.randn_like(p) for p in parameters]
    if where == "row":
        batches[2] = [batches[2][0]._replace(x=batches[2][0].x * value)]
    else:
        grads[0 if where == "gradient" else -1].view(-1)[3 - 2 * (where != "gradient")] = value
    before = [g.clone() for g in grads]
    message = "G must be finite, got a NaN or an infinity in row 2" if where == "row" else "grads must be finite"
    with layerwise_by(products), pytest.raises(RuntimeError, match=message):
        project_(grads, Fused(form="layerwise")(Objective(model, F.cross_entropy, True), batches, parameters))
    for mine, right in zip(grads, before, strict=True):
        assert_same_bits(mine, right)


@pytest.mark.parametrize("products", [True, False])
def test_the_task_that_is_not_finite_is_named_without_biases_too(products: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()
    batches = memory(SIZES, rows, classes)
    batches[2][0].x[1, 4] = float("nan")
    with layerwise_by(products):
        G = Fused(form="layerwise")(Objective(model, F.cross_entropy), batches, trained(model))
        with pytest.raises(RuntimeError, match=r"G must be finite, got a NaN .* in row 2"):
            project_([torch.randn_like(p) for p in model.parameters()], G)


def test_margin_and_ridge_are_checked() -> None:
    model = mlp(torch.float64)
    G = Fused(form="layerwise")(Objective(model, F.cross_entropy), memory(SIZES, rows, classes), trained(model))
    grads = [torch.randn_like(p) for p in model.parameters()]
    for option in ("margin", "ridge"):
        with pytest.raises(ValueError, match=f"{option} must be finite and not negative, got -1.0"):
            project_(grads, G, **{option: -1.0})


@pytest.mark.parametrize(
    ("n", "t", "shape", "cheaper"),
    [
        (19 * 7, 19, (100, 784), True),
        (19 * 8, 19, (100, 784), False),
        (19 * 32, 19, (100, 784), False),
        (19 * 256, 19, (100, 784), False),
        (2, 2, (1, 1), False),
        (10 * 8, 10, (4096, 4096), True),
        (10 * 8 * 64, 10, (4096, 4096), False),
    ],
)
def test_inner_products_are_taken_where_they_cost_less(n: int, t: int, shape: tuple[int, int], cheaper: bool) -> None:
    assert layerwise.products_are_cheaper(n, t, torch.Size(shape)) == cheaper


class Largest(TorchDispatchMode):
    """Notes the largest tensor that comes into being and is no view."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and not x._is_view():
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("t", [4, 12])
def test_no_tensor_grows_with_t_times_p(t: int, products: bool) -> None:
    layers = [nn.Sequential(nn.Linear(40, 40), nn.Tanh()) for _ in range(6)]
    model = nn.Sequential(nn.Embedding(50, 40), *layers, nn.Flatten(), nn.Linear(80, 3))
    p = sum(x.numel() for x in model.parameters())
    batches = memory((2,) * t, lambda n: torch.randint(50, (n, 2)), classes, torch.float32)
    parameters = trained(model)
    grads = [torch.randn_like(x) for x in parameters]
    engine, objective = Fused(form="layerwise"), Objective(model, F.cross_entropy)
    with layerwise_by(products, block_bytes=2**13):
        for _ in range(2):
            engine(objective, batches, parameters)  # with the comparisons, which have rows of one or two tasks
        with Largest() as largest:
            assert project_(grads, engine(objective, batches, parameters), 0.5).v.shape == (t,)
    assert largest.elements <= 4096 < p
    with Largest() as largest:
        fused(model)(batches, parameters)
    assert largest.elements >= t * p  # so that the count is seen to count


def large_layer() -> tuple[Any, list[nn.Parameter], Any, nn.Sequential]:
    """(t = 6 batches, trained parameters, objective, model) where a weight is larger than the layers' inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 3))
    batches = memory((2,) * 6, lambda n: torch.randn(n, 200), classes, torch.float32)
    return batches, trained(model), Objective(model, F.cross_entropy), model


@pytest.mark.parametrize("in_float64", [False, True])
def test_inner_products_make_no_tensor_of_a_weights_size(in_float64: bool) -> None:
    batches, parameters, objective, model = large_layer()
    with layerwise_by(products=True, block_bytes=2**15):
        G = Fused(form="layerwise")(objective, batches, parameters)
        G = G.in_float64() if in_float64 else G
        grads = [torch.randn_like(x) for x in parameters]
        expected = [x.clone() for x in grads]
        rows = fused(model)(batches, parameters).G
        v = torch.rand(6, dtype=torch.float64)
        with Largest() as largest:
            P, q = G.gram(grads)
            G.combine_(grads, v)
        assert largest.elements < model[0].weight.numel() / 4
    right = project_(expected, rows, 0.0).q
    torch.testing.assert_close(q, right, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(P, rows.double() @ rows.double().T, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("products", [True, False])
def test_one_row(products: bool) -> None:
    batches, parameters, objective, model = large_layer()
    rows = fused(model)(batches, parameters).G
    with layerwise_by(products, block_bytes=2**15):
        G = Fused(form="layerwise")(objective, batches, parameters)
        for k in range(6):
            with FlopCounterMode(display=False) as counter:
                row = one_row(G, k, 6, parameters)
            torch.testing.assert_close(row, rows[k : k + 1])
            if products:  # the examples of task k alone
                assert counter.get_total_flops() == 2 * 2 * (200 * 300 + 300 * 3)


# ---- in the hook -----------------------------------------------------------------------------------------------------


def run(model: nn.Module, steps: int, **options: Any) -> list[Tensor]:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=6), **options)
    violated = 0

    def loss_of(x: Tensor, y: Tensor, task: int) -> Tensor:
        return F.cross_entropy(model(x, task) if isinstance(model, MultiHead) else model(x), y)

    for batch in itertools.islice(stream(5, dtype=torch.float64), steps):
        train(model, optimizer, gem, [batch], loss_of=loss_of)
        violated += gem.last is not None and bool(gem.last.violations.any())
    assert violated > 2
    return [p.detach() for p in model.parameters()]


def test_a_step_within_autocast_is_projected_in_full_precision() -> None:
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))
    results = []
    for enabled in (False, True):
        torch.manual_seed(3)
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        gem = GEM(twin, optimizer, memory=EpisodicMemory(per_task=2), engine=Fused(form="layerwise"))
        with layerwise_by(products=True):
            for x, y, task in stream(4, batches=2):
                optimizer.zero_grad()
                F.cross_entropy(twin(x), y).backward()
                gem.observe(x, y, task)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                    optimizer.step()
        results.append([p.detach() for p in twin.parameters()])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("memory_batch", [None, 2])
@pytest.mark.parametrize("model", [mlp(torch.float64), MultiHead(5).double()], ids=["mlp", "multi-head"])
def test_twenty_steps_of_gem_are_the_same_with_every_engine(model: nn.Module, memory_batch: int | None) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    engines: list[Engine] = [Loop(), Fused(), Fused(form="rows", shortcuts=False), Fused(form="layerwise")]
    expected, *others = (run(copy.deepcopy(model), 20, memory_batch=memory_batch, engine=engine) for engine in engines)
    for other in others:
        for mine, right in zip(other, expected, strict=True):
            assert (mine - right).norm() <= 1e-10 * right.norm()
