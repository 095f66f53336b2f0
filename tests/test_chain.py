"""Chains of linear layers with ReLU between them: where they are recognised, and what they compute."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engines import assert_as_the_loop, half_of_each, log_lines, memory, relu_chain, sparse_rows, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from models import classes
from torch import Tensor, nn

from gem_fast import FusedTaskGradients
from gem_fast.task_gradients import fused
from gem_fast.task_gradients.chain import MOST_UNITS
from gem_fast.task_gradients.chain_pass import ChainPass
from gem_fast.task_gradients.verification import RowsDiffer

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (5, 3, 4)


def rows(n: int) -> Tensor:
    return torch.randn(n, 6)


def images(n: int) -> Tensor:
    return torch.randn(n, 1, 2, 3)


class Net(nn.Module):
    """Three layers, put together by `way`."""

    def __init__(self, way: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.way = way
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of layers of all chains that rows were written through."""
    seen: list[int] = []
    write = ChainPass.write

    def counted(chain: ChainPass, blocks: Any) -> list[bool]:
        seen.append(len(chain.weights))
        return write(chain, blocks)

    monkeypatch.setattr(ChainPass, "write", counted)
    return seen


def sequential(*front: nn.Module, inplace: bool = False, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        *front,
        nn.Linear(6, 7, bias),
        nn.ReLU(inplace),
        nn.Sequential(nn.Linear(7, 5, bias), nn.ReLU(inplace), nn.Linear(5, 3, bias)),
    ).double()


CHAINS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "sequential": (sequential, rows),
    "sequential of images": (lambda: sequential(nn.Flatten()), images),
    "no biases": (lambda: sequential(bias=False), rows),
    "changed in place": (lambda: sequential(inplace=True), rows),
    "two layers": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double(), rows),
    "behind an identity": (lambda: sequential(nn.Identity()), rows),
    "functional": (lambda: Net(lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x)))))), rows),
    "functional, of images": (lambda: Net(lambda net, x: net.c(net.b(net.a(x.flatten(1)).relu()).relu_())), images),
    "with scaled inputs": (lambda: Net(lambda net, x: net.c(torch.relu(net.b(torch.relu(net.a(2 * x)))))), rows),
    "dropping nothing": (lambda: sequential(nn.Dropout(0.0)), rows),
    "only some of the layers": (lambda: Net(lambda net, x: net.c(net.a(x).relu())), rows),
}


@pytest.mark.parametrize("sizes", [SIZES, (4, 4, 4)], ids=["ragged", "equal"])
@pytest.mark.parametrize("name", CHAINS)
def test_is_recognised(name: str, sizes: tuple[int, ...], chains: list[int]) -> None:
    make, inputs = CHAINS[name]
    assert_as_the_loop(make(), memory(sizes, inputs, classes))
    assert len(chains) == 3  # one to be verified, and two passes


def hooked(module: nn.Module, hook: Callable[..., Any]) -> nn.Module:
    next(m for m in module.modules() if isinstance(m, nn.ReLU)).register_forward_hook(hook)
    return module


def watched(net: Net, x: Tensor) -> Tensor:
    h = net.a(x).relu()
    if h.requires_grad:
        h.register_hook(lambda grad: 2 * grad)
    return net.c(net.b(h).relu())


def replaced() -> nn.Module:
    model = sequential()
    model[1].forward = lambda x: x.clamp(min=0.1)
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "another activation": lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double(),
    "no activation": lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double(),
    "an activation at the end": lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU()).double(),
    "one layer": lambda: nn.Sequential(nn.Linear(6, 3)).double(),
    "a way around": lambda: Net(lambda net, x: net.c(net.b(net.a(x).relu()).relu() + net.a(x))),
    "a scaled output": lambda: Net(lambda net, x: 2 * net.c(net.b(net.a(x).relu()).relu())),
    "a layer used twice": lambda: Net(lambda net, x: net.c(net.b(net.b(net.a(x).relu()).relu()).relu())),
    "a hook that changes an output": lambda: hooked(sequential(), lambda m, args, y: 3 * y),
    "a hook that changes a gradient": lambda: Net(watched),
    "wide": lambda: nn.Sequential(nn.Linear(6, MOST_UNITS + 1), nn.ReLU(), nn.Linear(MOST_UNITS + 1, 3)).double(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_more_goes_the_general_way(name: str, chains: list[int]) -> None:
    assert_as_the_loop(OTHERS[name](), memory(SIZES, rows, classes))
    assert chains == []


def test_a_replaced_forward_is_used() -> None:
    model = replaced()
    batches = memory(SIZES, rows, classes)
    got = FusedTaskGradients(model, F.cross_entropy)(batches, trained(model)).G
    for k, [batch] in enumerate(batches):
        grads = torch.autograd.grad(F.cross_entropy(model(batch.x), batch.y), trained(model))
        torch.testing.assert_close(got[k], torch.cat([g.flatten() for g in grads]), rtol=0, atol=1e-12)


def test_a_hook_registered_later_counts_from_then_on(chains: list[int]) -> None:
    model = sequential()
    batches = memory(SIZES, rows, classes)
    engine = FusedTaskGradients(model, F.cross_entropy)
    before = engine(batches, trained(model)).G
    handle = model[1].register_forward_hook(lambda module, args, y: 3 * y)
    with log_lines() as lines:
        assert not torch.allclose(engine(batches, trained(model)).G, before)
        handle.remove()
        torch.testing.assert_close(engine(batches, trained(model)).G, before, rtol=0, atol=1e-12)
    assert lines == []
    assert len(chains) == 4


LOSSES: dict[str, tuple[Any, Callable[[int], Tensor]]] = {
    "label smoothing": (partial(F.cross_entropy, label_smoothing=0.1), classes),
    "soft targets": (F.cross_entropy, lambda n: torch.rand(n, 3).softmax(1)),
    "regression": (F.mse_loss, lambda n: torch.randn(n, 3)),
    "ignored targets": (F.cross_entropy, lambda n: torch.where(torch.arange(n) == 1, -100, classes(n))),
}


@pytest.mark.parametrize("model", [sequential, CHAINS["functional"][0]], ids=["sequential", "functional"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, model: Callable[[], nn.Module], chains: list[int]) -> None:
    loss_fn, targets = LOSSES[name]
    assert_as_the_loop(model(), memory(SIZES, rows, targets), loss_fn)
    assert chains


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_parameters(frozen: int, chains: list[int]) -> None:
    model = sequential()
    list(model.parameters())[frozen].requires_grad_(False)
    assert_as_the_loop(model, memory(SIZES, rows, classes))
    assert chains


def test_other_parameters_get_zeros(chains: list[int]) -> None:
    model = CHAINS["only some of the layers"][0]()
    parameters = trained(model)
    G, reached = FusedTaskGradients(model, F.cross_entropy)(memory(SIZES, rows, classes), parameters)
    blocks = G.split([p.numel() for p in parameters], 1)
    assert reached == [True, True, False, False, True, True]
    assert [bool(block.any()) for block in blocks] == reached
    assert chains


@settings(max_examples=40, deadline=None)
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
    model = relu_chain(widths).to(dtype)
    batches = memory(sizes, lambda n: sparse_rows(n, widths[0], part), lambda n: torch.randint(widths[-1], (n,)), dtype)
    sample = half_of_each(sizes) if sampled else None
    # In float32 a ReLU's input may be zero but for rounding.
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    assert_as_the_loop(model, batches, tolerance=tolerance, sample=sample, tasks_per_pass=tasks_per_pass)


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=15, deadline=None)
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
    engine = FusedTaskGradients(model, F.cross_entropy)
    engine(batches, trained(model))
    batches[1][0].x[0, 0] = float("nan")
    G = engine(batches, trained(model)).G
    assert G.isfinite().all(1).tolist() == [True, False, True]


def test_the_same_bits_with_any_number_of_threads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 10))
    batches = memory((70, 31, 64), lambda n: torch.randn(n, 40), lambda n: torch.randint(10, (n,)), torch.float32)
    engine = FusedTaskGradients(model, F.cross_entropy)
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
    verify = fused.verify

    def first_differs(*args: Any) -> None:
        nonlocal left
        verify(*args)
        left -= 1
        if left >= 0:
            raise RowsDiffer("the gradients of a differ")

    monkeypatch.setattr(fused, "verify", first_differs)
    model = sequential().float()
    batches = memory(SIZES, rows, classes, torch.float32)
    # The whole, one half, the other half: what differs in all of them is no matter of rounding.
    assert_as_the_loop(model, batches, fallback="the gradients of a differ" if failures == 3 else None)


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
