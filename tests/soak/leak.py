"""Resident memory over 100,000 training steps and over 100,000 errors: it must stay flat.

    cd tests && python -m soak.leak --steps 100000

The result goes to bench/results/soak_leak.json; the exit status is 1 when memory grew.
"""

import argparse
import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from soak.record import write_result
from torch import nn
from tqdm import tqdm

import gem_fast
from gem_fast import ops

MIB = 2**20
# Once the allocators have warmed up, resident memory may move by this much, whatever the number of steps.
ALLOWED = 2 * MIB
# ... and the objects that Python keeps by this many in the second half: torch caches a few strings per address that its
# records of optimizer steps come to lie at, with plain SGD as well, until all such addresses have been seen.
ALLOWED_BLOCKS = 100

Step = Callable[[int], None]


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def training() -> Step:
    """Steps of GEM on a small model; four tasks keep coming back, so that there are always constraints."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gem = gem_fast.GEM(model, optimizer, memory=gem_fast.EpisodicMemory(per_task=8))

    def step(number: int) -> None:
        task = number // 50 % 4
        x = torch.randn(5, 10, generator=generator)
        y = (x[:, :3].roll(task, 1)).argmax(1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gem.observe(x, y, task)
        optimizer.step()

    return step


def errors() -> Step:
    """Calls that raise, each in another stage: in Python's checks, in the operator's, and after the computation."""
    G, bad_G = torch.randn(3, 1000), torch.randn(3, 1000)
    bad_G[1, 7] = float("nan")
    grads = [torch.randn(600).view(20, 30), torch.randn(400)]
    P = torch.eye(3).double()
    calls: list[Callable[[], object]] = [
        lambda: gem_fast.project_(grads, [G]),  # type: ignore[arg-type]
        lambda: gem_fast.project_(grads, G[:, :7]),
        lambda: gem_fast.project_(grads, bad_G),
        lambda: ops.gram(bad_G, [grads[0].T, grads[1]]),
        lambda: ops.combine_(grads, G, torch.full((3,), torch.inf).double()),
        lambda: ops.nnqp(P, torch.full((3,), torch.nan).double()),
        lambda: ops.pack_(torch.empty(5), grads),
    ]

    def step(number: int) -> None:
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            calls[number % len(calls)]()
            raise AssertionError(f"call {number % len(calls)} did not raise")

    return step


ACTIVITIES: dict[str, Callable[[], Step]] = {"training steps": training, "errors": errors}


def measure(step: Step, steps: int) -> dict[str, object]:
    """Takes `steps` steps and reads memory after each tenth of them; the first tenth is the warm-up."""
    start = time.perf_counter()
    mib, blocks = [], []
    for number in tqdm(range(steps), unit=" steps", mininterval=1.0, disable=None):
        step(number)
        if (number + 1) % (steps // 10) == 0:
            gc.collect()
            mib.append(resident() / MIB)
            blocks.append(sys.getallocatedblocks())
    grown, more = max(mib) - mib[0], blocks[-1] - blocks[len(blocks) // 2 - 1]
    return {
        "steps": steps,
        "resident_mib": [round(x, 2) for x in mib],
        "grown_mib": round(grown, 2),
        "python_blocks": blocks,
        "flat": grown * MIB <= ALLOWED and more <= ALLOWED_BLOCKS,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> int:
    """Runs every activity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # so small a model gains nothing from more
    measured = {name: measure(make(), steps) for name, make in ACTIVITIES.items()}
    path = write_result("soak_leak", measured)
    for name, result in measured.items():
        print(f"{steps} {name}: resident memory grew by {result['grown_mib']} MiB: {path}")
    return 0 if all(result["flat"] for result in measured.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
