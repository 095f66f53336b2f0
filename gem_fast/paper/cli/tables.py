"""The subcommands table1, table2, table3 and figure1: the paper's results from scratch, beside what it printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gem_fast.paper.config import Whole
from gem_fast.paper.data import MNIST_5K, STAND_IN
from gem_fast.paper.errors import extra
from gem_fast.paper.experiments.runner import CACHE, Experiment, TableOptions, run_experiments, write_table
from gem_fast.paper.experiments.training_run import Config, configuration
from gem_fast.paper.learners import PRESETS
from gem_fast.paper.reports.published import (
    MEASURES,
    PAPER_FIGURE1,
    PAPER_TABLE1,
    PAPER_TABLE2,
    PAPER_TABLE3,
    PUBLISHED_CODE,
    Numbers,
)
from gem_fast.paper.streams.config import DataOptions, RootOptions, download_data

__all__ = ["TABLES", "Table", "reproduce"]

# Less of everything, for a check that all works.
QUICK = {"tasks": 4, "samples_per_task": 200}
QUICK_CIFAR = {"tasks": 4, "samples_per_task": 20}
# The paper's sizes on CIFAR-100.
CIFAR = {"tasks": 20, "samples_per_task": 2500}
# Table 2: the examples in memory, all tasks together.
MEMORIES = (200, 1280, 2560, 5120)

STREAMS: tuple[Literal["permutations", "rotations", "cifar100"], ...] = ("permutations", "rotations", "cifar100")

DIVIDED = "BWT and FWT are divided by T - 1, as in the paper's equations; its code divides by T."
DIGITS = "Ours: 5000 MNIST digits, 4000 of them to learn from and 1000 to test; the paper's: all of MNIST."
CODE = "code: what the paper's code gives on these 5000 digits with seed 0."


@dataclass(frozen=True)
class TableSpec:
    """A result table before its experiments are run.

    Attributes:
        title: As in ResultTable.
        experiments: One for each row.
        notes: As in ResultTable.
    """

    title: str
    experiments: list[Experiment]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CifarOptions(TableOptions):
    """What runs on CIFAR-100."""

    cifar: str = "cifar100"
    """CIFAR-100: cifar100, as torchvision stores it, or a folder or .tar.gz"""
    memory_batch: Whole | None = None
    """examples that gem draws of each past task for a step on cifar100; None: all, as published"""

    @property
    def sampled(self) -> int | None:
        """As in TableOptions."""
        return self.memory_batch


@dataclass(frozen=True, kw_only=True)
class Table1Options(DataOptions, TableOptions):
    """The options of table1."""


@dataclass(frozen=True, kw_only=True)
class Table2Options(RootOptions, CifarOptions):
    """The options of table2."""


@dataclass(frozen=True, kw_only=True)
class Table3Options(DataOptions, TableOptions):
    """The options of table3."""


@dataclass(frozen=True, kw_only=True)
class Figure1Options(DataOptions, CifarOptions):
    """The options of figure1."""

    streams: tuple[Literal["permutations", "rotations", "cifar100"], ...] = STREAMS
    """panels of the figure"""


def reproduce(options: Any) -> None:
    """Runs what is missing of a table, prints it beside the paper's numbers and writes its files.

    Args:
        options: Of one of TABLES.

    Raises:
        InputError: An option cannot be used.
        KeyboardInterrupt: After SIGINT or SIGTERM.
    """
    with extra("the picture"):
        from gem_fast.paper.reports import table_plots
    name, make_spec = next((table.name, table.make_spec) for table in TABLES if table.options is type(options))
    options.prepare()
    spec = make_spec(options)
    if options.download:
        download_data(options.data_root, *dict.fromkeys(each.config["data"] for each in spec.experiments))
    # Table 1 compares times, which must be measured side by side: it does not take runs of other tables.
    rows = run_experiments(spec.experiments, options, cache=f"{CACHE}/table1" if name == "table1" else CACHE)
    notes = spec.notes
    if any(experiment.config["data"] == MNIST_5K for experiment in spec.experiments):
        notes += (DIGITS,)
    if any(experiment.published_code for experiment in spec.experiments):
        notes += (CODE,)
    write_table(name, spec.title, notes, rows, spec.experiments, options, table_plots.DRAWINGS[name])


def _table1(options: Table1Options) -> TableSpec:
    experiments = [
        Experiment(
            {"stream": stream, "learner": learner},
            _digits(options, stream, learner),
            ("seconds",),
            paper=PAPER_TABLE1.get((stream, learner), {}),
            published_code=_published_code(options, stream, learner, ("seconds",)),
        )
        for stream in ("permutations", "rotations")
        for learner in ("single", "independent", "multimodal", "ewc", "gem", "gem_pure_python", "agem")
        if (stream, learner) in PRESETS
    ]
    notes = ("Seconds of training without evaluation; the code's are with it.",)
    return TableSpec(
        f"Table 1: training time on {_name(options.data)} in seconds ({options.device})", experiments, notes
    )


def _table2(options: Table2Options) -> TableSpec:
    experiments = []
    for learner in ("gem", "icarl"):
        for memory in MEMORIES:
            per_task = memory // _cifar_size(options)["tasks"]
            size = {"memory_per_task": per_task} if learner == "gem" else {"memory": memory}
            config = _cifar(options, learner, **size)
            paper = {} if options.cifar == STAND_IN else PAPER_TABLE2[learner, memory]
            experiments.append(Experiment({"learner": learner, "memory": memory}, config, ("acc",), paper=paper))
    return TableSpec(f"Table 2: ACC on {_cifar_name(options)} by the examples in memory", experiments)


def _table3(options: Table3Options) -> TableSpec:
    experiments = []
    for learner in ("joint", "single", "independent", "multimodal", "ewc", "gem"):
        for epochs in (1, 2, 5):
            measures = ("acc",) if learner == "joint" else ("acc", "bwt")
            published_code = _published_code(options, "rotations", learner, measures) if epochs == 1 else {}
            paper = {name: PAPER_TABLE3[learner, epochs][name] for name in measures}
            config = _digits(options, "rotations", learner, epochs=epochs)
            condition = {"learner": learner, "epochs": epochs}
            experiments.append(Experiment(condition, config, measures, paper=paper, published_code=published_code))
    note = 'joint, the paper\'s "single, shuffled data", learns all tasks at once: the oracle.'
    title = f"Table 3: ACC and BWT on rotations of {_name(options.data)} by epochs per task"
    return TableSpec(title, experiments, (note, DIVIDED))


def _figure1(options: Figure1Options) -> TableSpec:
    experiments = []
    for stream in options.streams:
        for learner in ("single", "independent", "multimodal", "icarl", "ewc", "agem", "gem"):
            if (stream, learner) not in PRESETS or (learner == "icarl" and stream != "cifar100"):
                continue
            condition = {"stream": stream, "learner": learner}
            paper = PAPER_FIGURE1.get((stream, learner), {})
            published_code: Numbers = {}
            if stream == "cifar100":
                config = _cifar(options, learner)
                condition["stream"] = _cifar_name(options)
                paper = {} if options.cifar == STAND_IN else paper
            else:
                config = _digits(options, stream, learner)
                published_code = _published_code(options, stream, learner, MEASURES)
            experiments.append(Experiment(condition, config, MEASURES, True, paper, published_code))
    paper_note = "The paper's figure prints no numbers: here they are of the matrices of its Appendix B, divided by T."
    title = "Figure 1: ACC, BWT and FWT, and the first task along the stream"
    return TableSpec(title, experiments, (DIVIDED, paper_note))


class Table(NamedTuple):
    """A table or figure of the paper, and the command that reproduces it."""

    name: str
    options: type[TableOptions]
    make_spec: Callable[[Any], TableSpec]
    text: str

    @property
    def description(self) -> str:
        """For --help."""
        return (
            f"Reproduces {self.text}. Prints ours beside the paper's numbers and writes {self.name}.json, "
            f"{self.name}.md and {self.name}.png. An interrupted command goes on where it was: finished runs are in "
            "OUT/run_cache."
        )


TABLES = (
    Table("table1", Table1Options, _table1, "Table 1, the training time of all learners"),
    Table("table2", Table2Options, _table2, "Table 2, ACC on CIFAR-100 by the size of the memory"),
    Table("table3", Table3Options, _table3, "Table 3, ACC and BWT on rotations with 1, 2 and 5 epochs per task"),
    Table("figure1", Figure1Options, _figure1, "Figure 1, ACC, BWT and FWT of all learners on three streams"),
)


def _digits(options: Table1Options | Table3Options | Figure1Options, stream: str, learner: str, **more: Any) -> Config:
    size = QUICK if options.quick else {}
    more |= {"data": options.data, "data_root": options.data_root, "device": options.device}
    return configuration(stream, learner, **size, **more)


def _cifar(options: Table2Options | Figure1Options, learner: str, **more: Any) -> Config:
    if learner == "gem":
        more["memory_batch"] = options.memory_batch
    more |= {"data": options.cifar, "data_root": options.data_root, "device": options.device}
    return configuration("cifar100", learner, **_cifar_size(options), **more)


def _cifar_size(options: CifarOptions) -> dict[str, int]:
    return QUICK_CIFAR if options.quick else CIFAR


def _cifar_name(options: CifarOptions) -> str:
    return "a stand-in for CIFAR-100" if options.cifar == STAND_IN else "CIFAR-100"


def _published_code(options: DataOptions, stream: str, learner: str, measures: Sequence[str]) -> Numbers:
    numbers = PUBLISHED_CODE.get((stream, learner), {}) if options.data == MNIST_5K else {}
    return {name: value for name, value in numbers.items() if name in measures}


def _name(data: str) -> str:
    return Path(data).resolve().name
