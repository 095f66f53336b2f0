"""Each stage of the projection beside its floor, the solver, and other ways to project.

    python bench/gpu/kernels.py FILE [--seconds S] [--dry-run]

A floor is the larger of bytes over the bandwidth of a large copy and multiply-adds over the rate of a large matrix
product, both measured here first. G of p = 89,610 parameters stays in the second-level cache, as it does in training.
"""

import importlib.util
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from timing import Call, Device
from torch import Tensor

import gem_fast
from gem_fast import ops, reference, solver
from gem_fast.reference import Array

MARGIN = 0.5
P = (89_610, 1_109_240, 10_000_000, 100_000_000)
T = (19, 3, 10, 50)
DTYPES = (torch.float32, torch.bfloat16)
NNQP_T = (20, 3, 10, 32, 50, 100, 256)
NNQP_COUNT = (1, 4096, 64, 1024)
PARTS = 24  # tensors that a gradient consists of


def main() -> None:
    """All cases, the most telling first."""
    device = Device.from_command_line(__doc__)
    limits = measure_limits(device)
    small = device.dry
    for p in (1000,) if small else P:
        for t in (3, 19) if small else T:
            for dtype in DTYPES:
                device.try_case(
                    {"case": "stages", "p": p, "t": t, "dtype": str(dtype)[6:]},
                    lambda p=p, t=t, dtype=dtype: stages(device, limits, p, t, dtype),
                )
        if p == P[0] or small:
            for t in (3, 20) if small else NNQP_T:
                for count in (1, 4) if small else NNQP_COUNT:
                    device.try_case({"case": "nnqp", "t": t, "count": count}, lambda t=t, n=count: nnqp(device, t, n))
        if p <= P[1]:
            for t in (3,) if small else T:
                device.try_case({"case": "rivals", "p": p, "t": t}, lambda p=p, t=t: rivals(device, p, t))


def measure_limits(device: Device) -> dict[str, float]:
    """Bytes per second of a copy, and multiply-adds per second of matrix products."""
    n = 2**20 if device.dry else 2**29
    source = torch.empty(n, dtype=torch.float32, device=device.device)
    target = torch.empty_like(source)
    limits = {"copy": 2 * 4 * n / device.median(lambda: target.copy_(source))}
    side = 256 if device.dry else 8192
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        a, b = (torch.randn(side, side, device=device.device).to(dtype) for _ in range(2))
        limits[str(dtype)[6:]] = side**3 / device.median(lambda a=a, b=b: a @ b)
    device.write(case="limits", **limits)
    return limits


def gradient(p: int, t: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """G (t, p) and a gradient in several tensors of uneven sizes, with most constraints violated."""
    torch.manual_seed(0)
    per_line = 64 // dtype.itemsize
    G = torch.empty(t, -(-p // per_line) * per_line, dtype=dtype, device=device)[:, :p]
    g = torch.randn(p, device=device)
    for row in G:
        mine = torch.randn(p, device=device)
        row.copy_(mine)
        g -= 0.5 * mine
    cuts = [int(p * x / PARTS**2 / 2) for x in accumulate(range(1, PARTS))]
    return G, [part.clone() for part in g.to(dtype).tensor_split(cuts)]


def stages(device: Device, limits: dict[str, float], p: int, t: int, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of pack, gram, solve, combine and project, and floors; project needs no float64 products here.

    The rest of project is what its launches take beside these: its sums of slabs are gram's, and its two launches for
    float64 products return at once.
    """
    G, grads = gradient(p, t, dtype, device.device)
    incoming = [x.clone() for x in grads]
    row = torch.empty(p, dtype=dtype, device=device.device)
    v = torch.full((t,), 1e-3, dtype=torch.float64, device=device.device)

    def again() -> None:
        torch._foreach_copy_(grads, incoming)

    def project() -> None:
        again()
        gem_fast.project_(grads, G, MARGIN)

    project()
    solved = gem_fast.project_([x.clone() for x in incoming], G, MARGIN)
    gramian, q = ops.gram(G, incoming)
    dual = (gramian, q, flat(incoming).double().square().sum(), None, MARGIN, 0.0, False)
    size, rate = dtype.itemsize, limits[str(dtype)[6:]]
    row_bytes = p * size
    products = p * (t + 1) * (t + 2) / 2
    floors = {
        "pack": 2 * row_bytes / limits["copy"],
        "gram": max((t + 1) * row_bytes / limits["copy"], products / rate),
        "gram, float64": max((t + 1) * row_bytes / limits["copy"], products / limits["float64"]),
        "combine": (t + 2) * row_bytes / limits["copy"],
    }
    floors["project"] = floors["gram"] + floors["combine"]
    calls: dict[str, Call] = {
        "pack": lambda: ops.pack_(row, grads),
        "gram": lambda: ops.gram(G, grads),
        "gram, float64": lambda: ops.gram(G, grads, in_float64=True),
        "solve": lambda: torch.ops.gem_fast._project_dual(*dual),
        "combine": lambda: ops.combine_(grads, G, v),
        "project": project,
    }
    in_a_row = 10 if p < 5e6 else 2
    seconds = {name: device.replayed(call, in_a_row=in_a_row) for name, call in calls.items()}
    eager = {name: device.median(call, 0.1) for name, call in calls.items()}
    # Every projection gets the same incoming gradient; the copy is not its own.
    seconds["project"] -= device.replayed(again, in_a_row=in_a_row)
    eager["project"] -= device.median(again, 0.1)
    seconds["rest of project"] = seconds["project"] - sum(seconds[name] for name in ("gram", "solve", "combine"))
    return {
        "seconds": seconds,
        "eager_seconds": eager,
        "floor_seconds": floors,
        "status": int(solved.status),
        "residual": float(solved.residual),
        "violated": int(solved.violations.sum()),
    }


def nnqp(device: Device, t: int, count: int) -> dict[str, Any]:
    """Seconds of a batch of problems."""
    torch.manual_seed(0)
    distinct = min(count, max(1, 2**25 // (t * t)))
    # Gradients of related tasks share a part of their direction; about half of the constraints become active.
    G = torch.randn(distinct, t, 4 * t, dtype=torch.float64, device=device.device)
    G += 0.3 * torch.randn(distinct, 1, 4 * t, dtype=torch.float64, device=device.device)
    matrices = (G @ G.mT).repeat(-(-count // distinct), 1, 1)[:count].contiguous()
    g = torch.randn(count, 4 * t, dtype=torch.float64, device=device.device)
    q = torch.einsum("bti,bi->bt", G.repeat(-(-count // distinct), 1, 1)[:count], g).contiguous()
    solved = ops.nnqp(matrices, q)
    seconds = device.replayed(lambda: ops.nnqp(matrices, q), in_a_row=10 if count == 1 else 2)
    return {
        "seconds": seconds,
        "problems_per_second": count / seconds,
        "worst_residual": float(solved.residual.max()),
        "active": float((solved.v > 0).double().mean()),
    }


def rivals(device: Device, p: int, t: int) -> dict[str, Any]:
    """Other ways to the same projected gradient: seconds as a training loop would see them."""
    G, incoming = gradient(p, t, torch.float32, device.device)
    grads = [x.clone() for x in incoming]
    columns = torch.cat([G, torch.zeros(1, p, device=device.device)]).t().contiguous()
    methods: dict[str, Call] = {
        "ours": lambda: gem_fast.project_(grads, G, MARGIN, 1e-3),
        "published method": lambda: reference.project_columns_(grads, columns, MARGIN, 1e-3),
        "plain torch": lambda: plain_torch_(grads, G),
    }
    if importlib.util.find_spec("torchjd") is not None:
        methods["TorchJD"] = torchjd(grads, G)
    exact: Tensor | None = None
    seconds, differs = {}, {}
    for name, method in methods.items():
        torch._foreach_copy_(grads, incoming)
        method()
        result = flat(grads).double()
        exact = result if exact is None else exact
        differs[name] = float((result - exact).norm() / exact.norm())

        def once(method: Call = method) -> None:
            torch._foreach_copy_(grads, incoming)
            method()

        seconds[name] = device.median(once, 0.3, most=30)
    return {"seconds": seconds, "differs_from_ours": differs}


def plain_torch_(grads: list[Tensor], G: Tensor) -> None:
    """What a careful user would write: everything large on the device, the (t, t) problem on the host."""
    g = flat(grads)
    q = G @ g
    if not bool((q < 0).any()):
        return
    gramian = (G @ G.T).double().cpu().numpy()
    v = reference.nnqp(gramian, q.double().cpu().numpy(), MARGIN, 1e-3)
    write_(grads, g + torch.from_numpy(v).to(G) @ G)


def torchjd(grads: list[Tensor], G: Tensor) -> Call:
    """TorchJD's projection onto the dual cone of all gradients."""
    from torchjd.aggregation import DualProj

    aggregator = DualProj(pref_vector=torch.eye(len(G) + 1, device=G.device)[0])
    return lambda: write_(grads, aggregator(torch.cat([flat(grads).unsqueeze(0), G])))


def use_our_solver_where_quadprog_is_missing() -> None:
    """The published method with another solver of the same problem: its time is in the copies."""

    def solve(P: Array, q: Array, lower: float = 0.0, ridge: float = 0.0) -> Array:
        return solver.nnqp(P, q, lower, ridge)[0]

    if importlib.util.find_spec("quadprog") is None:
        reference.nnqp = solve


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def write_(grads: list[Tensor], g: Tensor) -> None:
    torch._foreach_copy_(grads, list(g.split([x.numel() for x in grads])))


if __name__ == "__main__":
    use_our_solver_where_quadprog_is_missing()
    main()
