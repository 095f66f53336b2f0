"""Result tables: what a table or figure of the paper comes to here, for the terminal, as Markdown and as JSON."""

import os
import platform
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import gem_fast
from gem_fast.paper.reports.published import Numbers

# Titles of columns; a name that is not here is its own title.
TITLES = {"acc": "ACC", "bwt": "BWT", "fwt": "FWT", "zero_shot": "zero-shot"}
SIGNED = ("bwt", "fwt")


@dataclass(frozen=True)
class MeanStd:
    """Mean and standard deviation of one measure over several seeds, whose values are in the order of the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """The sample standard deviation (divided by n - 1); None for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"mean": self.mean, "std": self.std, "values": list(self.values)}


# Positions along the stream, in tasks learned, and the accuracies there.
Curve = tuple[tuple[float, ...], tuple[MeanStd, ...]]


@dataclass(frozen=True)
class Row:
    """One row of a result table."""

    condition: dict[str, Any]  # what tells it from the other rows, by name: the stream, the learner, ...
    ours: dict[str, MeanStd]  # our measures by name: acc, bwt, fwt, zero_shot, seconds; empty if training diverged
    paper: Numbers = field(default_factory=dict)  # the paper's numbers by the same names, where it has any
    curves: dict[str, Curve] = field(default_factory=dict)  # by name, such as first_task

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = self.condition | {"ours": {name: measure.to_dict() for name, measure in self.ours.items()}}
        for name, (x, accuracy) in self.curves.items():
            found[name] = {"tasks_learned": x, "accuracy": [point.to_dict() for point in accuracy]}
        return found | {"paper": self.paper}


@dataclass(frozen=True)
class ResultTable:
    """A result table."""

    name: str  # of its files: table3
    title: str  # what it shows, on what data
    labels: tuple[str, ...]  # sentences that every output of it carries: that runs were cut short, say
    notes: tuple[str, ...]  # sentences below it
    seeds: tuple[int, ...]  # what the means are over
    rows: tuple[Row, ...]
    quick: bool  # whether the runs were cut short

    def to_text(self) -> str:
        """Aligned columns, for the terminal."""
        rows = self._text_rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * width for width in widths])
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.title, *self.labels, "", *lines, "", *self._footer()])

    def to_markdown(self) -> bytes:
        """A table with pipes, UTF-8."""
        head, *body = self._text_rows()
        lines = [f"# {self.title}", "", *(f"**{label}**\n" for label in self.labels)]
        lines += [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body]]
        return "\n".join([*lines, "", *(f"{sentence}\n" for sentence in self._footer())]).encode()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "machine": machine(), "rows": [row.to_dict() for row in self.rows]}

    def _footer(self) -> list[str]:
        seeds = ", ".join(map(str, self.seeds))
        over = f"Mean and standard deviation over seeds {seeds}." if len(self.seeds) > 1 else f"Seed {seeds}."
        this = machine()
        where = f"{this['cpu']}, {this['cores']} cores, {this['threads']} threads, torch {this['torch']}."
        return [*self.notes, f"{over} {where}"]

    def _text_rows(self) -> list[list[str]]:
        """The head and the rows, as texts."""
        parts = {"condition": ("", _condition_text), "ours": ("", _measured_text), "paper": ("paper: ", _paper_text)}
        columns = {
            f"{label}{TITLES.get(name, name.replace('_', ' '))}": [text(name, row) for row in self.rows]
            for part, (label, text) in parts.items()
            for name in dict.fromkeys(name for row in self.rows for name in getattr(row, part))
        }
        if not any(row.ours for row in self.rows):
            columns["ACC"] = ["diverged"] * len(self.rows)
        return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def machine() -> dict[str, Any]:
    """What kind of machine this is."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": gem_fast.build_info()["simd_in_use"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gem_fast": gem_fast.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    return found[1] if found else platform.processor() or platform.machine()


def _condition_text(name: str, row: Row) -> str:
    value = row.condition[name]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _measured_text(name: str, row: Row) -> str:
    if (measure := row.ours.get(name)) is None:
        return "-" if row.ours else "diverged"
    mean = _number_text(name, measure.mean)
    return mean if measure.std is None else f"{mean} ± {_number_text(name, measure.std).removeprefix('+')}"


def _paper_text(name: str, row: Row) -> str:
    """As many digits as were printed."""
    value = row.paper.get(name)
    return "-" if value is None else f"{value:+g}" if name in SIGNED else f"{value:g}"


def _number_text(name: str, value: float) -> str:
    if name == "seconds":
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
    return f"{value:+.3f}" if name in SIGNED else f"{value:.3f}"
