"""Sheets: what a table or figure of the paper comes to here, for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import gem_fast
from gem_fast.paper.published import Numbers

__all__ = ["Row", "Sheet", "Spread", "machine", "spreads"]

# Column titles; what is not here is its own title.
TITLES = {
    "acc": "ACC",
    "bwt": "BWT",
    "fwt": "FWT",
    "seconds": "seconds",
    "lr": "lr",
    "memory_per_task": "memory per task",
}
SIGNED = ("bwt", "fwt")


@dataclass(frozen=True)
class Spread:
    """One measure over several seeds.

    Attributes:
        values: One per seed, in the order of the seeds.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """The sample standard deviation (divided by n - 1); None for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"mean": self.mean, "std": self.std, "values": list(self.values)}


def spreads(values: Sequence[dict[str, float]]) -> dict[str, Spread]:
    """The measures of several seeds, by name, as one Spread each."""
    return {name: Spread(tuple(value[name] for value in values)) for name in values[0]}


@dataclass(frozen=True)
class Row:
    """One line of a sheet.

    Attributes:
        of: What was run, by name: the stream, the learner, ...
        ours: Our measures by name: acc, bwt, fwt, seconds; empty if training diverged.
        paper: The paper's numbers by the same names, where it has any.
        published_code: What its code gives on the same data, where that is known.
        curve: Positions along the stream, in tasks learned, and there the accuracy on the first task of every seed.
    """

    of: dict[str, Any]
    ours: dict[str, Spread]
    paper: Numbers = field(default_factory=dict)
    published_code: Numbers = field(default_factory=dict)
    curve: tuple[tuple[float, ...], tuple[Spread, ...]] | None = None

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        plain: dict[str, Any] = {
            **self.of,
            "ours": {name: spread.to_plain() for name, spread in self.ours.items()},
            "paper": self.paper,
            "published_code": self.published_code,
        }
        if self.curve is not None:
            x, accuracy = self.curve
            plain["first_task"] = {"tasks_learned": list(x), "accuracy": [spread.to_plain() for spread in accuracy]}
        return plain


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        name: Of its files: table3.
        title: What it shows, on what data.
        labels: Sentences that every output of it carries: that data are made up, that a run was cut short.
        notes: Sentences below it.
        seeds: What the means are over.
        rows: Its lines.
        facts: More for the JSON, by name.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    facts: dict[str, Any]

    def terminal(self) -> str:
        """Aligned columns."""
        lines = self._cells()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        texts.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.title, *self.labels, "", *(text.rstrip() for text in texts), "", *self._below()])

    def markdown(self) -> bytes:
        """A table with pipes, UTF-8."""
        head, *body = self._cells()
        lines = [f"# {self.title}", "", *(f"**{label}**\n" for label in self.labels)]
        lines += [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body]]
        return "\n".join([*lines, "", *(f"{sentence}\n" for sentence in self._below())]).encode()

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "labels": list(self.labels),
            "notes": list(self.notes),
            "seeds": list(self.seeds),
            **self.facts,
            "machine": machine(),
            "rows": [row.to_plain() for row in self.rows],
        }

    def _below(self) -> list[str]:
        many = len(self.seeds) > 1
        seeds = ", ".join(map(str, self.seeds))
        spread = f"Mean and standard deviation over seeds {seeds}." if many else f"Seed {seeds}."
        this = machine()
        where = f"{this['cpu']}, {this['cores']} cores, {this['threads']} threads, torch {this['torch']}."
        return [*self.notes, f"{spread} {where}"]

    def _cells(self) -> list[list[str]]:
        of = list(dict.fromkeys(name for row in self.rows for name in row.of))
        ours, paper, code = (
            list(dict.fromkeys(name for row in self.rows for name in part(row)))
            for part in (lambda row: row.ours, lambda row: row.paper, lambda row: row.published_code)
        )
        head = [_title(name) for name in [*of, *ours]]
        head += [f"paper: {_title(name)}" for name in paper] + [f"code: {_title(name)}" for name in code]
        body = [
            [
                *(_plain(row.of.get(name)) for name in of),
                *(_spread(name, row.ours.get(name), bool(row.ours)) for name in ours),
                *(_printed(name, row.paper.get(name)) for name in paper),
                *(_printed(name, row.published_code.get(name)) for name in code),
            ]
            for row in self.rows
        ]
        return [head, *body]


def machine() -> dict[str, Any]:
    """What kind of machine this is."""
    info = gem_fast.build_info()
    found = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": info["simd_in_use"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gem_fast": gem_fast.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _title(name: str) -> str:
    return TITLES.get(name, name.replace("_", " "))


def _plain(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _spread(name: str, spread: Spread | None, sound: bool) -> str:
    if spread is None:
        return "-" if sound else "diverged"
    if spread.std is None:
        return _number(name, spread.mean)
    return f"{_number(name, spread.mean)} ± {_number(name, spread.std).removeprefix('+')}"


def _printed(name: str, value: float | None) -> str:
    """As many digits as were printed."""
    return "-" if value is None else f"{value:+g}" if name in SIGNED else f"{value:g}"


def _number(name: str, value: float) -> str:
    if name == "seconds":
        return _short(value)
    return f"{value:+.3f}" if name in SIGNED else f"{value:.3f}"


def _short(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2f}"
