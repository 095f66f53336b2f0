"""Projections as large as they come: hundreds of tasks, tens of millions of parameters, within the stated memory.

    cd tests && python -m soak.large

Beside G and the gradient themselves `project_` needs at most `workspace_bytes(t)`, whatever p is. The largest G does
not fit into the memory of a small machine: it lies in a file that is mapped into memory and has holes where it is zero,
so that every one of its t * p elements is addressed and read. The result goes to bench/results/soak_large.json.
"""

import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from soak.record import write_result
from torch import Tensor

from gem_fast import Status, ops, project_

MIB = 2**20
FILLED = 4096  # elements of a row that are not zero, in a G with holes

# t, p, dtype, whether G is a file with holes
SIZES = (
    (500, 2_000_000, torch.float32, False),
    (100, 20_000_000, torch.bfloat16, False),
    (500, 20_000_000, torch.bfloat16, True),
)


def workspace_bytes(t: int) -> int:
    """The most that `project_` allocates: partial sums of P, P itself, the solver's factor, blocks of rows per thread.

    Partial sums are (t + 4)^2 doubles for each of at most 64 slabs, of which there are so many that together they stay
    below 2^22 doubles where one slab does; P and the factor of its active part are 1.5 t^2; a thread keeps twice 64
    rows of 1024 elements.
    """
    partial = max(2**22, (t + 4) ** 2)
    per_thread = 2 * 64 * 1024 * 8
    return 8 * (partial + 2 * (t + 4) ** 2) + torch.get_num_threads() * per_thread


def anonymous_memory() -> int:
    """Bytes of this process in memory that belong to no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class Peak:
    """The most anonymous memory while a block runs, in bytes above that at its start."""

    def __enter__(self) -> "Peak":
        self._start = anonymous_memory()
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, anonymous_memory() - self._start)


def dense(t: int, p: int, dtype: torch.dtype) -> Tensor:
    """Rows that share a part of their direction, as the gradients of related tasks do."""
    G = torch.empty(t, p, dtype=dtype)
    shared = torch.randn(p)
    for row in G:
        row.copy_(torch.randn(p) + 0.3 * shared)
    return G


def with_holes(file: Path, t: int, p: int, dtype: torch.dtype) -> Tensor:
    """The same, with all but the last `FILLED` columns zero: a file of t * p elements that takes little of the disk."""
    G = torch.from_file(str(file), shared=True, size=t * p, dtype=dtype).view(t, p)
    G[:, p - FILLED :] = dense(t, FILLED, dtype)
    return G


def measure(G: Tensor) -> dict[str, object]:
    """Projects a gradient that most rows object to, and projects the result again: nothing may be violated any more."""
    t, p = G.shape
    weights = torch.rand(t, dtype=torch.float64)
    g = (torch.randn(p) * 0.5).to(G.dtype)
    ops.combine_([g], G, -weights * (4 / t))
    length = float(g.double().norm())
    with Peak() as peak:
        start = time.perf_counter()
        projection = project_([g], G, margin=0.0)
        seconds = time.perf_counter() - start
    rows = torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in G])
    before = projection.q / rows
    after = project_([g], G, margin=0.0).q / rows
    return {
        "t": t,
        "p": p,
        "dtype": str(G.dtype).removeprefix("torch."),
        "G_gib": round(t * p * G.element_size() / 2**30, 2),
        "seconds": round(seconds, 2),
        "status": Status(int(projection.status)).name,
        "residual": float(projection.residual),
        "violated_before": int((before < 0).sum()),
        "worst_violation_before": float(-before.min() / length),
        "worst_violation_after": float((-after).max().clamp(min=0) / length),
        "workspace_mib": round(peak.bytes / MIB, 1),
        "workspace_bound_mib": round(workspace_bytes(t) / MIB, 1),
        "within_memory": peak.bytes <= workspace_bytes(t),
    }


def sound(result: dict[str, object]) -> bool:
    """Solved, within memory, and no violation left beyond what the rounding of g~ to G's dtype makes."""
    left = {"float32": 1e-6, "bfloat16": 1e-2}[str(result["dtype"])]
    return (
        result["status"] == "SOLVED" and bool(result["within_memory"]) and float(result["worst_violation_after"]) < left
    )  # type: ignore[arg-type]


def project_one(t: int, p: int, dtype: torch.dtype, holes: bool) -> dict[str, object]:
    """Draws G and projects."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        G = with_holes(Path(folder) / "G", t, p, dtype) if holes else dense(t, p, dtype)
        return {**measure(G), "file_with_holes": holes}


def main() -> int:
    """Every size in turn, each in a process of its own, whose memory nothing has used before."""
    results = []
    for size in SIZES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(project_one, size))
        print(results[-1], flush=True)
    write_result("soak_large", {"projections": results})
    return 0 if all(sound(result) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
