"""The operators on a GPU: the CPU's results, without waiting for the device, on any stream and any device.

What the kernels compute is also tested without a GPU (test_simt.py). Here it is their compiled form, and what only a
device can show: no synchronisation, CUDA graphs, streams and a second device.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from utils.asserts import assert_as_accurate_as_torch, assert_same_bits, kkt_violation
from utils.problems import DTYPES, problem
from utils.samplers import SAMPLERS, sample
from utils.training import train
from utils.waiting import waiting_raises

from gem_fast import GEM, EpisodicMemory, Status, ops, project_

pytestmark = pytest.mark.cuda

SHAPES = [(1, 1), (1, 7), (2, 1023), (3, 1025), (5, 4096), (19, 90_001), (32, 5000), (70, 3001), (300, 700)]


def to_gpu(tensors: list[Tensor], device: str = "cuda") -> list[Tensor]:
    return [x.to(device) for x in tensors]


def violated(t: int, p: int, dtype: torch.dtype = torch.float32, parts: int = 3) -> tuple[Tensor, list[Tensor]]:
    """G and grads, on the CPU, with many violated constraints."""
    G, grads = problem(t, p, dtype, parts)
    g = torch.cat(grads) - G.sum(0) / 2
    return G, [part.clone() for part in g.tensor_split(parts)]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Every call of torch that would wait for the device raises."""
    with waiting_raises():
        yield


def graph_of(step: Callable[[], object], warm_up: int) -> torch.cuda.CUDAGraph:
    """The step as a graph, after some steps on a stream of their own, as a capture asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


# ---- the CPU's results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "p"), SHAPES)
def test_gram_equals_float64(t: int, p: int, dtype: torch.dtype) -> None:
    G, grads = problem(t, p, dtype)
    P, q = ops.gram(G.cuda(), to_gpu(grads))
    g = torch.cat(grads)
    assert_as_accurate_as_torch(P.cpu(), G @ G.T, G.double() @ G.double().T)
    assert_as_accurate_as_torch(q.cpu(), G @ g, G.double() @ g.double())
    assert_same_bits(P, P.T.contiguous())


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_slices_and_strided_tensors(dtype: torch.dtype, offset: int) -> None:
    G = torch.randn(6, 45).to(dtype)[:, offset : offset + 40]
    grads = [torch.randn(5, 4).to(dtype).T, torch.zeros(0).to(dtype), torch.randn(40).to(dtype)[::2]]
    on_gpu = [grads[0].T.cuda().T, grads[1].cuda(), torch.zeros(40, dtype=dtype, device="cuda")[::2]]
    on_gpu[2].copy_(grads[2])
    wide = torch.zeros(6, 45, dtype=dtype, device="cuda")
    wide[:, offset : offset + 40] = G.cuda()
    P, q = ops.gram(wide[:, offset : offset + 40], on_gpu)
    P_cpu, q_cpu = ops.gram(G, grads)
    assert torch.allclose(P.cpu(), P_cpu, rtol=1e-5, atol=1e-5)
    assert torch.allclose(q.cpu(), q_cpu, rtol=1e-5, atol=1e-5)


def test_gram_gives_the_same_bits_every_time() -> None:
    G, grads = problem(19, 300_000, torch.float32)
    G, grads = G.cuda(), to_gpu(grads)
    P, q = ops.gram(G, grads)
    for _ in range(20):
        P_again, q_again = ops.gram(G, grads)
        assert_same_bits(P_again, P)
        assert_same_bits(q_again, q)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("t", [1, 2, 19, 33, 100, 256, 300])
def test_nnqp_meets_the_kkt_conditions(kind: str, t: int) -> None:
    G, g = sample(np.random.default_rng(t), kind, t, 2 * t)
    P, q = G @ G.T, G @ g
    v, status, residual = ops.nnqp(torch.from_numpy(P).cuda(), torch.from_numpy(q).cuda(), 0.5)
    bound = 1e-6 if kind == "nearly_conflicting" else 1e-9
    assert status == Status.SOLVED
    assert residual <= bound
    assert (v >= 0.5).all()
    assert kkt_violation(P, q, v.cpu().numpy(), 0.5) <= bound


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,), (5000,)])
@pytest.mark.parametrize("shared", [True, False])
def test_nnqp_of_batches(shape: tuple[int, ...], shared: bool) -> None:
    G = torch.randn(*(() if shared else shape), 6, 20).double()
    P, q = G @ G.mT, torch.randn(*shape, 6).double()
    ours = ops.nnqp(P.cuda(), q.cuda(), 0.5, 1e-3)
    theirs = ops.nnqp(P, q, 0.5, 1e-3)
    assert ours.v.shape == q.shape
    assert ours.status.shape == ours.residual.shape == shape
    assert torch.allclose(ours.v.cpu(), theirs.v, atol=1e-9)
    assert ours.status.cpu().equal(theirs.status)


def test_nnqp_reports_what_is_not_finite() -> None:
    P, q = torch.eye(3).double().repeat(4, 1, 1).cuda(), -torch.ones(4, 3).double().cuda()
    q[2, 1], P[0, 1, 2] = float("nan"), float("inf")
    v, status, _ = ops.nnqp(P, q)
    assert status.tolist() == [Status.NON_FINITE, Status.SOLVED, Status.NON_FINITE, Status.SOLVED]
    assert not v[0].any()
    assert not v[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "p"), SHAPES)
def test_combine_equals_the_cpu(t: int, p: int, dtype: torch.dtype) -> None:
    G, grads = problem(t, p, dtype)
    v = torch.rand(t).double() * (torch.arange(t) % 3 != 1)
    on_gpu = to_gpu(grads)
    ops.combine_(on_gpu, G.cuda(), v.cuda())
    ops.combine_(grads, G, v)
    tolerance = 2 * float(torch.finfo(dtype).eps)
    for x, y in zip(on_gpu, grads, strict=True):
        assert torch.allclose(x.cpu().double(), y.double(), rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_writes_every_element_in_order(dtype: torch.dtype) -> None:
    tensors = [torch.randn(n).to(dtype) for n in (5, 0, 1, 70_000, 3)] + [torch.randn(4, 6).to(dtype).T]
    rows = torch.full((3, 70_043), float("nan"), device="cuda").to(dtype)
    row = rows[1, 1:70_037]
    ops.pack_(row, [*(x.cuda() for x in tensors), None], [*(x.numel() for x in tensors), 3])
    assert_same_bits(row.cpu(), torch.cat([*(x.reshape(-1) for x in tensors), torch.zeros(3).to(dtype)]))
    assert rows.isnan().sum() == rows.numel() - row.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [3, 500])
def test_project_equals_the_cpu(dtype: torch.dtype, parts: int) -> None:
    G, grads = violated(9, 50_000, dtype, parts)
    on_gpu = to_gpu(grads)
    ours = project_(on_gpu, G.cuda(), 0.5)
    theirs = project_(grads, G, 0.5)
    assert theirs.violations.any()
    assert ours.status == Status.SOLVED
    assert torch.allclose(ours.v.cpu(), theirs.v, atol=1e-4)
    assert torch.allclose(ours.q.cpu(), theirs.q, rtol=1e-4, atol=1e-2)
    tolerance = 1e-4 + 4 * float(torch.finfo(dtype).eps)
    assert torch.allclose(torch.cat(on_gpu).cpu().double(), torch.cat(grads).double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [12, 40])
def test_the_device_takes_float64_products_where_float32_is_not_enough(dtype: torch.dtype, t: int) -> None:
    basis = torch.randn(3, 4000)
    G = (torch.randn(t, 3) @ basis + 1e-3 * torch.randn(t, 4000)).to(dtype)
    g = (torch.randn(4000) - G.float().sum(0) / 10).to(dtype)
    on_gpu = [g.cuda()]
    ours = project_(on_gpu, G.cuda())
    assert ours.status == Status.SOLVED
    _, q = ops.gram(G.cuda(), [g.cuda()], in_float64=True)
    assert_same_bits(ours.q, q)
    theirs = project_([exact := g.double()], G.double())
    assert theirs.status == Status.SOLVED
    rounding = 1e-4 + float(torch.finfo(dtype).eps)
    assert (on_gpu[0].cpu().double() - exact).norm() <= rounding * g.double().norm()


def test_without_violation_every_bit_stays() -> None:
    G = torch.randn(4, 1000)
    G[:, 0] = 1.0
    g = G.sum(0) * 10
    g[0] = -0.0
    grads = [g.cuda()]
    projection = project_(grads, G.cuda())
    assert projection.status == Status.SOLVED
    assert not projection.violations.any()
    assert not projection.v.any()
    assert_same_bits(grads[0].cpu(), g)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["G", "grads"])
def test_non_finite_leaves_the_gradient_and_says_so(bad: float, where: str) -> None:
    G, grads = torch.randn(3, 500, device="cuda"), [-torch.ones(200, device="cuda"), torch.randn(300, device="cuda")]
    (G[1] if where == "G" else grads[1])[7] = bad
    before = [x.clone() for x in grads]
    projection = project_(grads, G)
    assert projection.status == Status.NON_FINITE
    assert not projection.v.any()
    for x, y in zip(grads, before, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("t", [0, 1])
def test_empty_problems(t: int) -> None:
    projection = project_([torch.zeros(0, device="cuda")], torch.zeros(t, 0, device="cuda"))
    assert projection.v.shape == (t,)
    assert projection.status == Status.SOLVED


def test_tensors_on_different_devices_are_named() -> None:
    G, grads = problem(2, 10, torch.float32)
    with pytest.raises(ValueError, match=r"grads\[0\] must be on G's device cuda:0, got cpu"):
        project_(grads, G.cuda())


def test_training_follows_the_cpu() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 40, 12).double(), torch.randint(0, 4, (3, 40))
    parameters = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=8))
        for task in range(3):
            batches = zip(x[task].to(device).split(10), y[task].to(device).split(10), [task] * 4, strict=True)
            train(model, optimizer, gem, batches)
        parameters.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
    assert torch.allclose(parameters[0], parameters[1], atol=1e-9)


# ---- what only a device can show -------------------------------------------------------------------------------------


def test_nothing_waits_for_the_device(no_synchronisation: None) -> None:
    G = torch.randn(5, 3000, device="cuda")
    grads = [torch.randn(40, 50, device="cuda").T, torch.randn(1000, device="cuda")]
    row = torch.empty(3000, device="cuda")

    def every_operator() -> None:
        project_(grads, G)
        P, q = ops.gram(G, grads)
        ops.combine_(grads, G, ops.nnqp(P, q, 0.5).v)
        ops.pack_(row, grads)

    every_operator()  # the first call loads kernels and allocates, which may wait
    # torch raises for its own waits only. If one of ours waited, this kernel, which takes a second, would be over.
    torch.cuda._sleep(2_000_000_000)
    over = torch.cuda.Event()
    over.record()
    every_operator()
    assert not over.query()


def test_a_graph_replays_the_projection() -> None:
    shape = (7, 20_000)
    G = torch.zeros(shape, device="cuda")
    grads = [x.cuda() for x in torch.zeros(shape[1]).tensor_split(5)]
    row = torch.zeros(shape[1], device="cuda")

    v = torch.zeros(shape[0], dtype=torch.float64, device="cuda")

    def step() -> None:
        v.copy_(project_(grads, G).v)
        ops.pack_(row, grads)

    graph = graph_of(step, warm_up=1)
    for against in (True, False, True):
        rows, parts = violated(*shape, parts=5)
        if not against:
            parts = [part.clone() for part in rows.sum(0).tensor_split(5)]
        G.copy_(rows)
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part)
        graph.replay()
        eager = to_gpu(parts)
        expected = project_(eager, G)
        assert bool(expected.v.any()) == against
        assert_same_bits(v, expected.v)
        assert_same_bits(torch.cat(grads), torch.cat(eager))
        assert_same_bits(row, torch.cat(eager))


def test_a_graph_replays_a_whole_optimizer_step() -> None:
    def trained(captured: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=8))
        x, y = torch.randn(12, 10, 12, device="cuda"), torch.randint(4, (12, 10), device="cuda")
        for task in range(3):
            gem.observe(x[task], y[task], task)
        inputs, targets = x[0].clone(), y[0].clone()

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

        if captured:
            one_step: Callable[[], object] = graph_of(step, warm_up=3).replay
        else:
            one_step = step
            for _ in range(3):
                step()
        for k in range(3, 12):
            inputs.copy_(x[k])
            targets.copy_(y[k])
            one_step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.allclose(trained(captured=True), trained(captured=False), atol=1e-5)


def test_work_is_enqueued_on_the_current_stream() -> None:
    G, grads = violated(5, 100_000)
    theirs = project_([x.clone() for x in grads], G)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The inputs appear on this stream, after it has been kept busy: another stream would read them too early.
        on_gpu, G_gpu = [torch.zeros_like(x, device="cuda") for x in grads], torch.zeros_like(G, device="cuda")
        torch.cuda._sleep(50_000_000)
        G_gpu.copy_(G)
        for x, y in zip(on_gpu, grads, strict=True):
            x.copy_(y)
        ours = project_(on_gpu, G_gpu)
    stream.synchronize()
    assert torch.allclose(ours.v.cpu(), theirs.v, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_on_the_second_device() -> None:
    G, grads = violated(5, 10_000)
    on_gpu = to_gpu(grads, "cuda:1")
    assert torch.cuda.current_device() == 0
    ours = project_(on_gpu, G.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    theirs = project_(grads, G)
    assert ours.v.device == torch.device("cuda:1")
    assert torch.allclose(ours.v.cpu(), theirs.v, atol=1e-4)
    assert torch.allclose(torch.cat(on_gpu).cpu(), torch.cat(grads), atol=1e-3)
    with pytest.raises(ValueError, match=r"grads\[0\] must be on G's device cuda:1, got cuda:0"):
        project_(to_gpu(grads, "cuda:0"), G.to("cuda:1"))
