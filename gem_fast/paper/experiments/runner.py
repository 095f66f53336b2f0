"""Runs the experiments of a result table: the commands' common options, from experiments to rows, and the files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gem_fast.paper.config import Options
from gem_fast.paper.data import STAND_IN
from gem_fast.paper.errors import InputError
from gem_fast.paper.experiments.protocol import Record
from gem_fast.paper.experiments.run_cache import run_cached
from gem_fast.paper.experiments.training_run import Config, check_device
from gem_fast.paper.files import prepare_folder
from gem_fast.paper.reports.published import MEASURES, Numbers
from gem_fast.paper.reports.result import to_json, write_files
from gem_fast.paper.reports.result_table import MeanStd, ResultTable, Row, mean_std_by_measure

__all__ = [
    "CACHE",
    "Experiment",
    "TableOptions",
    "parse_seeds",
    "run_experiments",
    "write_table",
]

# The folder of the run cache, within --out.
CACHE = "run_cache"
QUICK_LABEL = "QUICK: few tasks, examples and seeds, a check that all works; not comparable with the paper."
STAND_IN_LABEL = "STAND-IN: cifar100 is made-up images of CIFAR-100's shape; its numbers say nothing of CIFAR-100."
SAMPLED_LABEL = "SAMPLED: gem on cifar100 draws {} examples of each past task for a step; the paper uses all of them."


@dataclass(frozen=True)
class Experiment:
    """A configuration that is run with several seeds: a row of a result table.

    Attributes:
        condition: As in Row.
        config: The configuration, but for the seed.
        measures: Which of acc, bwt, fwt and seconds the row has.
        first_task: Whether the row has the curve of the first task.
        paper: As in Row.
        published_code: As in Row.
    """

    condition: dict[str, Any]
    config: Config
    measures: Sequence[str] = MEASURES
    first_task: bool = False
    paper: Numbers = field(default_factory=dict)
    published_code: Numbers = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TableOptions(Options):
    """What all commands with a result table have."""

    default_seeds: ClassVar[tuple[int, ...]] = (0, 1, 2, 3, 4)

    quick: bool = False
    """less of everything: a check that it works"""
    seeds: str | None = None
    """seeds such as 0-4, 3 or 0,2; None: five, one for grid, with --quick at most two"""
    device: str = "cpu"
    """torch device"""
    out: Path | None = None
    """folder for the results, shared by all tables; None: out/paper, with --quick out/paper-quick"""
    download: bool = False
    """let torchvision download the data sets into --data-root, unless they are there"""

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds."""
        if self.seeds is None:
            return self.default_seeds[:2] if self.quick else self.default_seeds
        return parse_seeds(self.seeds)

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path("out/paper-quick" if self.quick else "out/paper")

    @property
    def sampled(self) -> int | None:
        """The examples of each past task that gem draws for a step on cifar100; None: it takes all."""
        return None

    def prepare(self) -> None:
        """Raises InputError unless the seeds, the device and the folder can be used."""
        check_device(self.device)
        _ = self.seed_numbers
        prepare_folder("--out", self.folder)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Reads seeds, such as 0-4, 3 or 0,2.

    Args:
        text: The option's text.

    Returns:
        The seeds, at least one, all different.

    Raises:
        InputError: It is of another form.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        seeds = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not 0 < len(seeds) <= 1000:
            raise InputError(f"--seeds must be seeds such as 0-4, 3 or 0,2, got {text!r}")
        found += seeds
    return tuple(dict.fromkeys(found))


def run_experiments(
    experiments: Sequence[Experiment], options: TableOptions, *, cache: str = CACHE, may_diverge: bool = False
) -> list[Row]:
    """Runs each experiment with each seed, but for the runs that are in the cache.

    Args:
        experiments: The experiments.
        options: With the seeds and the folder.
        cache: The folder of the run cache within the folder.
        may_diverge: As for `run_cached`; an experiment that diverged with one seed has no measures.

    Returns:
        A row for each experiment.

    Raises:
        InputError: As `run_cached`.
        KeyboardInterrupt: As `run_cached`.
    """
    # Seed by seed, so that a machine that changes its speed changes it for all experiments.
    configs = [experiment.config | {"seed": seed} for seed in options.seed_numbers for experiment in experiments]
    all_records = run_cached(options.folder / cache, configs, may_diverge=may_diverge)
    rows = []
    for i, experiment in enumerate(experiments):
        records = [record for record in all_records[i :: len(experiments)] if record is not None]
        ours, curve = {}, None
        if len(records) == len(options.seed_numbers):
            ours = mean_std_by_measure(
                [{name: _measure(record, name) for name in experiment.measures} for record in records]
            )
            curve = _first_task(records) if experiment.first_task else None
        rows.append(Row(experiment.condition, ours, experiment.paper, experiment.published_code, curve))
    return rows


def write_table(
    name: str,
    title: str,
    notes: tuple[str, ...],
    rows: Sequence[Row],
    experiments: Sequence[Experiment],
    options: TableOptions,
    draw: Callable[[ResultTable], bytes] | None = None,
) -> None:
    """Writes a table's files into the folder, the JSON last, and prints it.

    Args:
        name: As in ResultTable.
        title: As in ResultTable.
        notes: As in ResultTable.
        rows: What `run_experiments` returned, in the order in which they are shown.
        experiments: The experiments, whose data may be a stand-in: the table then says so.
        options: With all that the table says of them.
        draw: Makes a PNG file of the table, if it has one.

    Raises:
        InputError: A file cannot be written.
    """
    flags = {"quick": options.quick, "stand_in": any(each.config["data"] == STAND_IN for each in experiments)}
    labels = [label for label, holds in zip((QUICK_LABEL, STAND_IN_LABEL), flags.values(), strict=True) if holds]
    if sampled := options.sampled:
        labels.append(SAMPLED_LABEL.format(sampled))
    table = ResultTable(name, title, tuple(labels), notes, options.seed_numbers, tuple(rows), flags)
    files = {f"{name}.md": table.to_markdown()}
    if draw is not None:
        files[f"{name}.png"] = draw(table)
    files[f"{name}.json"] = to_json(table.to_dict())
    write_files(options.folder, files)
    print(table.to_text())
    print(f"written: {', '.join(str(options.folder / file) for file in files)}")


def _measure(record: Record, name: str) -> float:
    return record.train_seconds if name == "seconds" else float(getattr(record, name))


def _first_task(records: list[Record]) -> Any:
    """The curve of a Row."""
    x = np.append(0, records[0].batch) * len(records[0].baseline) / records[0].batch[-1]
    curves = [np.append(record.baseline[0], record.accuracy[:, 0]).tolist() for record in records]
    return tuple(x.tolist()), tuple(MeanStd(values) for values in zip(*curves, strict=True))
