"""Linear layers with ReLU between them: where they are recognised, and what they compute."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from utils.engines import (
    assert_as_the_loop,
    bound,
    fused,
    half_of_each,
    log_lines,
    memory,
    relu_mlp,
    sparse_rows,
    trained,
)
from utils.mlps import LOSSES, MLPS, OTHERS, SIZES, sequential
from utils.models import classes, rows
from utils.training import train

from gem_fast import GEM, Batch, Engine, EpisodicMemory, Fused, Loop, Sample
from gem_fast.gradients.cpu_mlp import MlpPass
from gem_fast.gradients.fused.verifier import RowsDiffer, Verifier
from gem_fast.paper.data import MNIST_5K, load_data

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of layers of all such models that rows were written through."""
    seen: list[int] = []
    write = MlpPass.write

    def counted(done: MlpPass, *args: Any) -> None:
        seen.append(len(done.weights))
        write(done, *args)

    monkeypatch.setattr(MlpPass, "write", counted)
    return seen


@pytest.mark.parametrize("sizes", [SIZES, (4, 4, 4)], ids=["ragged", "equal"])
@pytest.mark.parametrize("name", MLPS)
def test_is_recognised(name: str, sizes: tuple[int, ...], passes: list[int]) -> None:
    make, inputs = MLPS[name]
    assert_as_the_loop(make(), memory(sizes, inputs, classes))
    assert len(passes) == 3  # one to be verified, and two passes


def replaced() -> nn.Module:
    model = sequential()
    model[1].forward = lambda x: x.clamp(min=0.1)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_more_goes_the_general_way(name: str, passes: list[int]) -> None:
    assert_as_the_loop(OTHERS[name](), memory(SIZES, rows, classes))
    assert passes == []


@pytest.mark.parametrize("part", [0.2, 1.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("refresh_every", [1, 2, 4, 7])
def test_tasks_that_come_one_by_one(refresh_every: int, part: float) -> None:
    """There are passes of one task, of several and of none."""
    torch.manual_seed(0)
    model = relu_mlp([12, 5, 3]).double()
    batches = [
        [Batch(k, torch.randn(6, 12).double() * (torch.rand(6, 12) < part), torch.randint(3, (6,)))] for k in range(4)
    ]
    engine, reference = (
        bound(kind(refresh_every=refresh_every), model, F.cross_entropy, False) for kind in (Fused, Loop)
    )
    for t in (1, 1, 1, 2, 2, 2, 3, 4, 4, 4, 4, 4, 4):
        with torch.no_grad():
            model[0].weight.mul_(1.01)
        expected = reference(batches[:t], trained(model)).G
        torch.testing.assert_close(engine(batches[:t], trained(model)).G, expected, rtol=0, atol=1e-12)


def test_a_replaced_forward_is_used() -> None:
    model = replaced()
    batches = memory(SIZES, rows, classes)
    got = fused(model)(batches, trained(model)).G
    for k, [batch] in enumerate(batches):
        grads = torch.autograd.grad(F.cross_entropy(model(batch.x), batch.y), trained(model))
        torch.testing.assert_close(got[k], torch.cat([g.flatten() for g in grads]), rtol=0, atol=1e-12)


def test_a_hook_registered_later_counts_from_then_on(passes: list[int]) -> None:
    model = sequential()
    batches = memory(SIZES, rows, classes)
    engine = fused(model)
    before = engine(batches, trained(model)).G
    handle = model[1].register_forward_hook(lambda module, args, y: 3 * y)
    with log_lines() as lines:
        assert not torch.allclose(engine(batches, trained(model)).G, before)
        handle.remove()
        torch.testing.assert_close(engine(batches, trained(model)).G, before, rtol=0, atol=1e-12)
    assert lines == []
    assert len(passes) == 4


@pytest.mark.parametrize("model", [sequential, MLPS["functional"][0]], ids=["sequential", "functional"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, model: Callable[[], nn.Module], passes: list[int]) -> None:
    loss_fn, targets = LOSSES[name]
    assert_as_the_loop(model(), memory(SIZES, rows, targets), loss_fn)
    assert passes


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_parameters(frozen: int, passes: list[int]) -> None:
    model = sequential()
    list(model.parameters())[frozen].requires_grad_(False)
    assert_as_the_loop(model, memory(SIZES, rows, classes))
    assert passes


def test_other_parameters_get_zeros(passes: list[int]) -> None:
    model = MLPS["only some of the layers"][0]()
    parameters = trained(model)
    G, reached = fused(model)(memory(SIZES, rows, classes), parameters)
    blocks = G.split([p.numel() for p in parameters], 1)
    assert reached == [True, True, False, False, True, True]
    assert [bool(block.any()) for block in blocks] == reached
    assert passes


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    widths=st.lists(st.integers(1, 70), min_size=3, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    part=st.sampled_from([0.1, 1.0]),
    tasks_per_pass=st.sampled_from([1, 2, 5]),
    sampled=st.booleans(),
    seed=st.integers(0, 3),
)
def test_any_sizes(
    sizes: list[int],
    widths: list[int],
    dtype: torch.dtype,
    part: float,
    tasks_per_pass: int,
    sampled: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = relu_mlp(widths).to(dtype)
    batches = memory(sizes, lambda n: sparse_rows(n, widths[0], part), lambda n: torch.randint(widths[-1], (n,)), dtype)
    sample = half_of_each(sizes) if sampled else None
    # In float32 a ReLU's input may be zero but for rounding.
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    assert_as_the_loop(model, batches, tolerance=tolerance, sample=sample, tasks_per_pass=tasks_per_pass)


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    widths=st.lists(st.sampled_from([1, 3, 15, 16, 17, 64, 70]), min_size=3, max_size=4),
    seed=st.integers(0, 3),
)
def test_operators_equal_autograd(dtype: torch.dtype, sizes: list[int], widths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    n = sum(sizes)
    weights = [torch.randn(o, i, dtype=dtype, requires_grad=True) for i, o in itertools.pairwise(widths)]
    biases = [torch.randn(o, dtype=dtype, requires_grad=True) for o in widths[1:]]
    z = torch.randn(n, widths[0], dtype=dtype, requires_grad=True)
    h, activations = z, []
    for weight, bias in zip(weights, biases, strict=True):
        activations.append(h.relu())
        h = F.linear(activations[-1], weight, bias)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    grad = torch.randn_like(h)
    first = torch.empty(widths[0], 1, dtype=dtype)  # the layer before; only its size counts
    G = torch.full((len(sizes), sum(w.numel() + len(w) for w in weights) + widths[0]), 7.0, dtype=dtype)
    parts = iter(G.split([x.numel() for pair in zip(weights, biases, strict=True) for x in pair] + [widths[0]], 1))
    weight_rows, bias_rows = [], []
    for weight in weights:
        weight_rows.append(next(parts).unflatten(1, weight.shape))
        bias_rows.append(next(parts))
    bias_rows.insert(0, next(parts))
    inputs = [a.detach() for a in activations]
    delta = torch.ops.gem_fast._mlp_backward(grad, inputs, [first, *weights], weight_rows, bias_rows, sizes)
    start = 0
    for k, size in enumerate(sizes):
        mine = torch.zeros_like(grad)
        mine[start : start + size] = grad[start : start + size]
        start += size
        of_z, *others = torch.autograd.grad(h, [z, *weights, *biases], mine, retain_graph=True)
        for got, right in zip([*weight_rows, *bias_rows[1:], bias_rows[0]], [*others, of_z.sum(0)], strict=True):
            torch.testing.assert_close(got[k], right, **{**tolerance, "atol": 30 * tolerance["atol"]})
    of_z = torch.autograd.grad(h, z, grad, retain_graph=True)[0]
    torch.testing.assert_close(delta[:, : widths[0]], of_z, **{**tolerance, "atol": 30 * tolerance["atol"]})
    assert not delta[:, widths[0] :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = [3, 1, 6]
    logits = (30 * torch.randn(10, 4, dtype=dtype)).requires_grad_()
    target = torch.randint(4, (10,))
    losses = [F.cross_entropy(z, y) for z, y in zip(logits.split(sizes), target.split(sizes), strict=True)]
    [expected] = torch.autograd.grad(torch.stack(losses).sum(), logits)
    got = torch.ops.gem_fast._cross_entropy_gradient(logits.detach(), target, sizes)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_values_that_are_not_finite_reach_the_rows() -> None:
    model = sequential()
    batches = memory(SIZES, rows, classes)
    engine = fused(model)
    engine(batches, trained(model))
    batches[1][0].x[0, 0] = float("nan")
    G = engine(batches, trained(model)).G
    assert G.isfinite().all(1).tolist() == [True, False, True]


def test_the_same_bits_with_any_number_of_threads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 10))
    batches = memory((70, 31, 64), lambda n: torch.randn(n, 40), lambda n: torch.randint(10, (n,)), torch.float32)
    engine = fused(model)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(engine(batches, trained(model)).G)
    torch.set_num_threads(1)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_relu_that_rounding_flips_is_no_mistake(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = failures
    verify = Verifier._check_up_to_coincidence

    def first_differs(*args: Any) -> None:
        nonlocal left
        verify(*args)
        left -= 1
        if left >= 0:
            raise RowsDiffer("the gradients of a differ")

    monkeypatch.setattr(Verifier, "_check_up_to_coincidence", first_differs)
    model = sequential().float()
    batches = memory(SIZES, rows, classes, torch.float32)
    with log_lines() as lines:
        fused(model)(batches, trained(model))
    # The whole, one half, the other half: what differs in all of them is no matter of rounding.
    assert [line.endswith("the gradients of a differ") for line in lines] == [True] * (failures == 3)


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("flat", [True, False], ids=["sequential", "functional"])
def test_real_digits(flat: bool, sampled: bool) -> None:
    layers = [nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10)]
    model = nn.Sequential(nn.Flatten(), *layers) if flat else nn.Sequential(nn.Flatten(), nn.Dropout(0.0), *layers)
    sample = Sample(torch.cat([torch.randperm(30)[:7] + n for n in (0, 40, 79, 117)]), [7] * 4) if sampled else None
    data = load_data(MNIST_5K)
    images, labels = iter(data.train_images.double().div(255).split(40)), iter(data.train_labels.split(40))
    batches = memory((40, 39, 38, 37), lambda n: next(images)[:n], lambda n: next(labels)[:n])
    assert_as_the_loop(model.double(), batches, sample=sample)


def test_bad_arguments_of_the_operators() -> None:
    ops = torch.ops.gem_fast
    weight, bias = torch.zeros(2, 3), torch.zeros(2)
    nothing = torch.zeros(0)

    def mlp_pass(weights: list[Tensor], biases: list[Tensor]) -> None:
        rows = [nothing.to(weights[0].dtype)] * len(weights)
        ops._mlp_pass(torch.zeros(4, 3), [], None, torch.zeros(4).long(), weights, biases, rows[1:], rows, [4])

    with pytest.raises(ValueError, match=r"weights\[0\] must be float32 or float64, got float16"):
        mlp_pass([weight.half(), weight.half()], [bias.half(), bias.half()])
    with pytest.raises(ValueError, match=r"weights\[1\] must take the 2 outputs of the layer before, got shape \(2, 3"):
        mlp_pass([weight, weight], [bias, bias])
    with pytest.raises(ValueError, match=r"bias must have shape \(outputs,\) = \(2,\) and float32, got \(3,\)"):
        mlp_pass([weight, weight.T.contiguous()], [torch.zeros(3), bias])
    backward = partial(ops._mlp_backward, torch.zeros(4, 2))
    with pytest.raises(
        ValueError, match=r"inputs\[0\] must have shape \(n, 3\), float32 and contiguous rows, got \(4, 5"
    ):
        backward([torch.zeros(4, 5)], [torch.zeros(3, 1), weight], [nothing], [nothing] * 2, [4])
    with pytest.raises(ValueError, match=r"weights must be two or more, .* got 1, 1 and 1"):
        backward([torch.zeros(4, 3)], [weight], [nothing], [nothing], [4])
    before = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"weight_rows must have one contiguous matrix of 6 elements per task, got"):
        backward([torch.zeros(4, 3)], [before, weight], [torch.zeros(2, 2, 3)], [nothing] * 2, [4])
    with pytest.raises(ValueError, match=r"grad must have shape \(n, outputs\) = \(5, 2\), got \(4, 2\)"):
        backward([torch.zeros(5, 3)], [before, weight], [nothing], [nothing] * 2, [5])
    with pytest.raises(ValueError, match="target must be from 0 to 2, got 3"):
        ops._cross_entropy_gradient(torch.zeros(1, 3), torch.tensor([3]), [1])
    with pytest.raises(ValueError, match="sizes must add up to n = 1, got 2"):
        ops._cross_entropy_gradient(torch.zeros(1, 3), torch.tensor([0]), [2])


# ---- a kind of pass that was made before -----------------------------------------------------------------------------


def hook_on_all(model: nn.Module) -> Any:
    def bent(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        return output * 1.5 if isinstance(module, nn.Linear) else None

    return nn.modules.module.register_module_forward_hook(bent)


def hook_on_one(model: nn.Module) -> Any:
    return model[0].register_forward_hook(lambda _module, _inputs, output: output * 1.5)


def other_layer(model: nn.Module) -> None:
    model[1] = nn.Tanh()


def frozen_bias(model: nn.Module) -> None:
    model[0].bias.requires_grad_(False)


def moved_storage(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data.clone() * 0.5


CHANGES = {f.__name__: f for f in (hook_on_all, hook_on_one, other_layer, frozen_bias, moved_storage)}


@pytest.mark.parametrize("by_step", [False, True], ids=["hook", "step"])
@pytest.mark.parametrize("memory_batch", [None, 3], ids=["all", "sampled"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_passes_is_seen(change: str, memory_batch: int | None, by_step: bool) -> None:
    """What a pass has found out of the model is not taken for granted in the next one."""

    def after_training(engine: Engine) -> list[Tensor]:
        torch.manual_seed(0)
        model = relu_mlp([6, 5, 3]).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gem = GEM(model, optimizer, engine=engine, memory=EpisodicMemory(8), memory_batch=memory_batch, margin=0.1)
        batches = [(torch.randn(4, 6).double(), torch.randint(3, (4,)), i // 6) for i in range(24)]
        train(model, optimizer, gem, batches[:21], by_step=by_step)
        handle = CHANGES[change](model)
        train(model, optimizer, gem, batches[21:], by_step=by_step)
        if handle is not None:
            handle.remove()
        return [p.detach().clone() for p in model.parameters()]

    for mine, theirs in zip(after_training(Fused()), after_training(Loop()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
