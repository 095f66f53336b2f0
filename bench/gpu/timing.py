"""Medians of what a device takes, after warm-up: by its own events on a GPU, by the clock in a dry run on a CPU."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]


def graph_of(call: Call, warm_up: int, in_a_row: int = 1) -> torch.cuda.CUDAGraph:
    """Calls in a row as a CUDA graph, after a few on a stream of their own, as a capture asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(in_a_row):
            call()
    return graph


@dataclass
class Device:
    """The device that is measured, where results go, and how long there is.

    Attributes:
        lines: the file, one JSON object a line.
    """

    lines: Path
    dry: bool
    seconds: float
    started: float = field(default_factory=time.monotonic)

    @staticmethod
    def from_command_line(description: str | None) -> "Device":
        """FILE [--seconds S] [--dry-run]."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("lines", type=Path)
        parser.add_argument("--seconds", type=float, default=100.0)
        parser.add_argument("--dry-run", action="store_true")
        options = parser.parse_args()
        if options.dry_run:
            torch.set_num_threads(1)
        return Device(options.lines, options.dry_run, options.seconds)

    @property
    def device(self) -> torch.device:
        """Where tensors go."""
        return torch.device("cpu" if self.dry else "cuda")

    def has_time(self) -> bool:
        """Whether another measurement may begin."""
        return time.monotonic() - self.started < self.seconds

    def write(self, **line: Any) -> None:
        """Adds a line, at once."""
        with self.lines.open("a") as to:
            to.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def try_case(self, name: dict[str, Any], case: Callable[[], dict[str, Any]]) -> None:
        """Measures a case and writes its line; one that fails says so in its line and stops nothing."""
        if not self.has_time():
            return
        try:
            self.write(**name, **case())
        except Exception as error:
            self.write(**name, error=f"{type(error).__name__}: {error}"[:300])
        if not self.dry:
            torch.cuda.empty_cache()

    def median(self, call: Call, seconds: float = 0.3, most: int = 200) -> float:
        """Seconds of one call, issued by the host as a training loop would."""
        for _ in range(1 if self.dry else 5):
            call()
        first = self._once(call)
        rounds = 2 if self.dry else max(5, min(most, int(seconds / max(first, 1e-6))))
        return statistics.median(self._once(call) for _ in range(rounds))

    def replayed(self, call: Call, seconds: float = 0.2, in_a_row: int = 10) -> float:
        """Seconds of one call out of several in a CUDA graph: without what the host takes to launch them."""
        if self.dry:
            return self.median(call)
        graph = graph_of(call, warm_up=3, in_a_row=in_a_row)
        return self.median(graph.replay, seconds, most=50) / in_a_row

    def _once(self, call: Call) -> float:
        if self.dry:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
