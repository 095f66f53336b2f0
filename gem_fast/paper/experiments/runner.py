"""Runs the experiments of a result table: the commands' common options, from experiments to rows, and the files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from gem_fast.metrics import zero_shot
from gem_fast.paper.config import Seed
from gem_fast.paper.data import download
from gem_fast.paper.experiments.protocol import Record
from gem_fast.paper.experiments.run_cache import run_cached
from gem_fast.paper.experiments.training_run import RunConfig, check_device
from gem_fast.paper.files import prepare_folder, write_files
from gem_fast.paper.reports.published import MEASURES, Numbers
from gem_fast.paper.reports.result import to_json
from gem_fast.paper.reports.result_table import Curve, MeanStd, ResultTable, Row
from gem_fast.paper.streams.config import RootOptions

# The folder of the run cache, within --out.
CACHE = "run_cache"
QUICK_LABEL = "QUICK: few tasks, examples and seeds, a check that all works; not comparable with the paper."
SAMPLED_LABEL = "SAMPLED: gem draws {} examples of each past task for a step; the paper uses all of them."


@dataclass(frozen=True)
class Experiment:
    """A configuration that is run with several seeds, and what its `Row` of a result table shows."""

    condition: dict[str, Any]  # as in Row
    config: RunConfig  # all but the seed
    measures: Sequence[str] = MEASURES  # which of acc, bwt, fwt, zero_shot and seconds the row has
    paper: Numbers = field(default_factory=dict)  # as in Row
    curve: Literal["first_task", "zero_shot"] | None = None  # accuracy along the stream: on which tasks


class TableOptions(RootOptions):
    """What all commands with a result table have."""

    default_seeds: ClassVar[tuple[int, ...]] = (0, 1, 2, 3, 4)

    quick: bool = False
    """less of everything: a check that it works"""
    seeds: tuple[Seed, ...] = ()
    """one or more seeds; none: 0 to 4, for grid 0, with --quick at most two"""
    device: str = "cpu"
    """torch device"""
    out: Path | None = None
    """folder for the results, shared by all tables; None: out/paper, with --quick out/paper-quick"""
    download: bool = False
    """let torchvision download the data sets into --data-root, unless they are there"""

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(dict.fromkeys(self.seeds)) or self.default_seeds[: 2 if self.quick else None]

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path("out/paper-quick" if self.quick else "out/paper")

    def prepare(self, *data: str) -> None:
        """Downloads data sets where asked to; raises InputError unless device and folder can be used."""
        check_device(self.device)
        prepare_folder("--out", self.folder)
        if self.download:
            download(*data, root=self.data_root)


def run_experiments(experiments: Sequence[Experiment], options: TableOptions, cache: str = CACHE) -> list[Row]:
    """Runs each experiment with each seed; runs that are in `cache`, a folder within --out, are not computed again.

    Returns a row for each experiment, without measures where training diverged with any seed. Raises as `run_cached`.
    """
    # Seed by seed, so that a machine that changes its speed changes it for all experiments.
    configs = [experiment.config | {"seed": seed} for seed in options.seed_numbers for experiment in experiments]
    all_records = run_cached(options.folder / cache, configs)
    rows = []
    for i, experiment in enumerate(experiments):
        records = [record for record in all_records[i :: len(experiments)] if record is not None]
        ours: dict[str, MeanStd] = {}
        curves: dict[str, Curve] = {}
        if len(records) == len(options.seed_numbers):
            for name in experiment.measures:
                attribute = "train_seconds" if name == "seconds" else name
                ours[name] = MeanStd(tuple(float(getattr(record, attribute)) for record in records))
            curves = {experiment.curve: _curve(experiment.curve, records)} if experiment.curve else {}
        rows.append(Row(experiment.condition, ours, experiment.paper, curves))
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
    """Writes the files of a ResultTable into the folder, the JSON last, and prints it.

    Where a memory is sampled, the table says so. Its picture, if it has one, is a PNG file that `draw` makes. Raises
    InputError where a file cannot be written.
    """
    gems = [each.config for each in experiments if each.config["learner"] == "gem"]
    labels = [SAMPLED_LABEL.format(size) for size in dict.fromkeys(gem["memory_batch"] for gem in gems) if size]
    labels[:0] = [QUICK_LABEL] * options.quick
    table = ResultTable(name, title, tuple(labels), notes, options.seed_numbers, tuple(rows), options.quick)
    files = {f"{name}.md": table.to_markdown()}
    if draw is not None:
        files[f"{name}.png"] = draw(table)
    files[f"{name}.json"] = to_json(table.to_dict())
    write_files(options.folder, files)
    print(table.to_text())
    print(f"written: {', '.join(str(options.folder / file) for file in files)}")


def _curve(name: str, records: list[Record]) -> Curve:
    if name == "first_task":
        x = np.append(0, records[0].batch) * len(records[0].baseline) / records[0].batch[-1]
        curves = [np.append(record.baseline[0], record.accuracy[:, 0]) for record in records]
    else:
        curves = [np.append(record.baseline.mean(), zero_shot(record.accuracy, record.task)) for record in records]
        x = np.arange(len(curves[0]))
    return tuple(x.tolist()), tuple(MeanStd(tuple(values)) for values in np.stack(curves, axis=1).tolist())
