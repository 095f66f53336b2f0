"""gradients="gramian": the projection of the rows, without the rows."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from utils.asserts import assert_same_bits
from utils.engines import assert_projects_as_rows, assert_untouched, log_lines, memory, trained
from utils.forwards import LOOPED, WAYS, Net
from utils.layers import LAYERS, Attention, Head, of
from utils.models import CASES, MultiHead, Transformer, case, classes, mlp, rows, stream, tokens

from gem_fast import AGEM, GEM, EpisodicMemory, FusedTaskGradients, LoopTaskGradients
from gem_fast.task_gradients import Sample, gramian
from gem_fast.task_gradients.gramian import GramianProjection

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (4, 3, 4, 5)


@pytest.fixture(params=[2**24, 200], ids=["whole parameters", "a few rows at a time"], autouse=True)
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gramian, "_BLOCK_BYTES", request.param)


assert_projects_as_rows_do = partial(assert_projects_as_rows, GramianProjection)


def sizes(parameters: list[nn.Parameter]) -> list[int]:
    return [parameter.numel() for parameter in parameters]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_projects_as_rows_do(name: str, training: bool) -> None:
    model, inputs, targets, loss_fn = case(name)
    model = model.double().train(training)
    assert_projects_as_rows_do(model, memory(SIZES, inputs, targets), loss_fn, pass_task=name == "multi-head")


@pytest.mark.parametrize("t", [1, 2, 7])
@pytest.mark.parametrize("name", ["mlp", "transformer, tied", "multi-head"])
def test_numbers_of_tasks(name: str, t: int) -> None:
    model, inputs, targets, loss_fn = case(name)
    batches = memory((3,) * t, inputs, targets)
    assert_projects_as_rows_do(model.double(), batches, loss_fn, pass_task=name == "multi-head")


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    layer, shape = LAYERS[name]
    model = Head(layer()).double()
    assert_projects_as_rows_do(model, memory(SIZES, of(*shape), classes))


@pytest.mark.parametrize("options", [{}, {"cross": True}, {"cross": True, "kdim": 4, "vdim": 3}], ids=str)
def test_attention(options: dict[str, Any]) -> None:
    assert_projects_as_rows_do(Attention(**options).double(), memory(SIZES, of(5, 6), classes))


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_use(way: str) -> None:
    assert_projects_as_rows_do(Net(WAYS[way]), memory(SIZES, rows, classes))


@pytest.mark.parametrize("name", ["mlp", "multi-head"])
def test_sample(name: str) -> None:
    model, inputs, targets, loss_fn = case(name)
    sample = Sample(torch.tensor([0, 2, 5, 8, 10, 15]), [2, 1, 2, 1])
    batches = memory(SIZES, inputs, targets)
    assert_projects_as_rows_do(model.double(), batches, loss_fn, pass_task=name == "multi-head", sample=sample)


def test_a_memory_of_mostly_zeros() -> None:
    model = nn.Sequential(nn.Linear(100, 20), nn.Tanh(), nn.Linear(20, 3))
    batches = memory((30, 25, 30), lambda n: torch.relu(torch.randn(n, 100) - 1.5), classes, torch.float32)
    assert_projects_as_rows_do(model, batches, tolerance=1e-4)


def test_float32() -> None:
    batches = memory(SIZES, tokens, classes, torch.float32)
    assert_projects_as_rows_do(Transformer(), batches, tolerance=1e-4)


@pytest.mark.parametrize("way", LOOPED)
def test_models_that_need_the_loop_are_refused(way: str) -> None:
    reason, forward = LOOPED[way]
    model = Net(forward)
    grads = [torch.randn_like(p) for p in model.parameters()]
    before = [g.clone() for g in grads]
    project = GramianProjection(model, F.cross_entropy)
    with log_lines() as lines, pytest.raises(RuntimeError, match=f'"gramian" takes a model.*{reason}.*take "rows"'):
        project(memory(SIZES, rows, classes), list(model.parameters()), grads)
    assert lines == []
    assert all(g.equal(b) for g, b in zip(grads, before, strict=True))
    assert_untouched(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["row", "gradient", "unused gradient"])
def test_values_that_are_not_finite(where: str, value: float) -> None:
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
    with pytest.raises(RuntimeError, match=message):
        GramianProjection(model, F.cross_entropy, pass_task=True)(batches, parameters, grads)
    for mine, right in zip(grads, before, strict=True):
        assert_same_bits(mine, right)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that comes into being and is no view."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and not x._is_view():
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("t", [4, 12])
def test_no_tensor_grows_with_t_times_p(t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gramian, "_BLOCK_BYTES", 2**13)
    layers = [nn.Sequential(nn.Linear(40, 40), nn.Tanh()) for _ in range(6)]
    model = nn.Sequential(nn.Embedding(50, 40), *layers, nn.Flatten(), nn.Linear(80, 3))
    p = sum(sizes(list(model.parameters())))
    batches = memory((2,) * t, lambda n: torch.randint(50, (n, 2)), classes, torch.float32)
    parameters = trained(model)
    grads = [torch.randn_like(x) for x in parameters]
    project = GramianProjection(model, F.cross_entropy)
    project(batches, parameters, grads)  # with the verification, which has rows of two tasks
    with Largest() as largest:
        assert project(batches, parameters, grads, 0.5)[0].v.shape == (t,)
    assert largest.elements <= 4096 < p
    with Largest() as largest:
        FusedTaskGradients(model, F.cross_entropy)(batches, parameters)
    assert largest.elements >= t * p  # so that the count is seen to count


# ---- in the hook -----------------------------------------------------------------------------------------------------


def run(model: nn.Module, steps: int, batches: Any = None, **options: Any) -> list[Tensor]:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=6), **options)
    violated = 0
    for x, y, task in batches or [b for _, b in zip(range(steps), stream(5, dtype=torch.float64), strict=False)]:
        optimizer.zero_grad()
        output = model(x, task) if isinstance(model, MultiHead) else model(x)
        F.cross_entropy(output, y).backward()
        gem.observe(x, y, task)
        optimizer.step()
        violated += gem.last is not None and bool(gem.last.violations.any())
    assert violated > 2
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("model", [mlp(torch.float64), MultiHead(5).double()], ids=["mlp", "multi-head"])
def test_twenty_steps_of_gem_are_the_same_with_every_engine(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    pass_task = isinstance(model, MultiHead)
    loop, fused, gramian_ = (copy.deepcopy(model) for _ in "abc")
    expected = run(loop, 20, task_gradients=LoopTaskGradients(loop, F.cross_entropy, pass_task=pass_task))
    for other, options in ((fused, {}), (gramian_, {"gradients": "gramian"})):
        for mine, right in zip(run(other, 20, **options), expected, strict=True):
            assert (mine - right).norm() <= 1e-10 * right.norm()


def test_the_hook_samples_with_it() -> None:
    models = [mlp(torch.float64)]
    models.append(copy.deepcopy(models[0]))
    ours, theirs = (
        run(model, 20, memory_batch=2, gradients=gradients)
        for model, gradients in zip(models, ("gramian", "rows"), strict=True)
    )
    for mine, right in zip(ours, theirs, strict=True):
        assert (mine - right).norm() <= 1e-10 * right.norm()


def test_averaged_gem_with_it() -> None:
    model = mlp(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = AGEM(model, optimizer, gradients="gramian")
    for x, y, task in stream(3, dtype=torch.float64):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gem.observe(x, y, task)
        optimizer.step()
    assert gem.last is not None
    assert gem.last.v.shape == (1,)


def test_options_that_do_not_go_with_it() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = FusedTaskGradients(model, F.cross_entropy, tasks_per_pass=2)
    with pytest.raises(ValueError, match=r'task_gradients must be None with gradients="gramian".*no tasks_per_pass'):
        GEM(model, optimizer, gradients="gramian", task_gradients=engine)
    with pytest.raises(
        ValueError, match='refresh_every must be 1 with gradients="gramian", which keeps no rows, got 2'
    ):
        GEM(model, optimizer, gradients="gramian", refresh_every=2)
    with pytest.raises(ValueError, match='gradients must be "rows" or "gramian", got \'columns\''):
        GEM(model, optimizer, gradients="columns")
