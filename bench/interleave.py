"""Timing rivals side by side: round by round in one run, so that a machine that changes speed changes it for all.

The method under test is the one that pytest-benchmark times. Its rivals are timed before each of its rounds; their
medians and the median of the ratios, round by round, are kept in the benchmark's `extra_info`.
"""

import statistics
import time
from collections.abc import Callable

import torch
from pytest_benchmark.fixture import BenchmarkFixture

Call = Callable[[], object]

# NumPy's and torch's idle threads spin for milliseconds before they sleep, which would slow down whoever comes next.
THREADS_ASLEEP = 0.03


def interleave(
    benchmark: BenchmarkFixture,
    ours: Call,
    rivals: dict[str, Call],
    rounds: int,
    *,
    pause: float = 0.0,
    ready: bool = True,
) -> None:
    """Times one call of each method per round.

    Args:
        benchmark: pytest-benchmark's fixture.
        ours: the method under test.
        rivals: what a user would use instead, by name.
        rounds: measurements of each.
        pause: seconds to wait before each measurement; `THREADS_ASLEEP` where methods bring threads of their own.
        ready: whether a call that does not count comes before each one that does, so that every method finds its own
            threads awake and its data in the caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *rivals)}

    def get_ready(call: Call) -> None:
        time.sleep(pause)
        if ready:
            call()

    def measure(name: str, call: Call) -> None:
        start = now()
        call()
        seconds[name].append(now() - start)

    def before_ours() -> None:
        for name, call in rivals.items():
            get_ready(call)
            measure(name, call)
        get_ready(ours)

    benchmark.pedantic(measure, args=("ours", ours), setup=before_ours, rounds=rounds)
    benchmark.extra_info["median_seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
    benchmark.extra_info["times_as_fast"] = {
        name: statistics.median([theirs / mine for theirs, mine in zip(seconds[name], seconds["ours"], strict=True)])
        for name in rivals
    }


def now() -> float:
    """Seconds, once a GPU has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
