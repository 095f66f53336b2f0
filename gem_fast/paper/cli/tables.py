"""The subcommands table1, table2, table3 and figure1: the paper's results from scratch, beside what it printed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gem_fast.paper.cli.numbers import whole
from gem_fast.paper.cli.stream_options import add_data_options, add_root_options, download_data
from gem_fast.paper.data import MNIST_5K, STAND_IN
from gem_fast.paper.errors import extra
from gem_fast.paper.experiments.presets import PRESETS
from gem_fast.paper.experiments.runner import (
    CACHE,
    Experiment,
    add_options,
    prepare,
    run_experiments,
    write_table,
)
from gem_fast.paper.experiments.training_run import Config, configuration
from gem_fast.paper.reports.published import (
    MEASURES,
    PAPER_FIGURE1,
    PAPER_TABLE1,
    PAPER_TABLE2,
    PAPER_TABLE3,
    PUBLISHED_CODE,
    Numbers,
)

__all__ = ["add_parser"]

# Less of everything, for a check that all works.
QUICK = {"tasks": 4, "samples_per_task": 200}
QUICK_CIFAR = {"tasks": 4, "samples_per_task": 20}
# The paper's sizes on CIFAR-100.
CIFAR = {"tasks": 20, "samples_per_task": 2500}
# Table 2: the examples in memory, all tasks together.
MEMORIES = (200, 1280, 2560, 5120)

STREAMS = ("permutations", "rotations", "cifar100")

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


def add_parser(subparsers: Any) -> None:
    """Adds the subcommands to the command line.

    Args:
        subparsers: What argparse's add_subparsers returned.
    """
    for name, (make_spec, text) in COMMANDS.items():
        parser = subparsers.add_parser(
            name,
            help=text,
            description=f"Reproduces {text}. Prints ours beside the paper's numbers and writes {name}.json, {name}.md "
            f"and {name}.png. An interrupted command goes on where it was: finished runs are in OUT/run_cache.",
            allow_abbrev=False,
        )
        parser.set_defaults(command=partial(_run, name, make_spec))
        add_options(parser, default_seeds=range(5))
        if name == "table2":
            add_root_options(parser)
        else:
            add_data_options(parser, MNIST_5K, MNIST_5K)
        if name in ("table2", "figure1"):
            parser.add_argument(
                "--cifar",
                metavar="DATA",
                default="cifar100",
                help="CIFAR-100: cifar100, as torchvision stores it, or a folder or .tar.gz (default: %(default)s)",
            )
            parser.add_argument(
                "--memory-batch",
                type=whole(1),
                metavar="N",
                help="examples that gem draws of each past task for a step on cifar100 (default: all, as published)",
            )
        if name == "figure1":
            parser.add_argument(
                "--streams",
                nargs="+",
                choices=STREAMS,
                default=list(STREAMS),
                help="panels of the figure (default: all)",
            )


def _run(name: str, make_spec: Callable[[argparse.Namespace], TableSpec], args: argparse.Namespace) -> None:
    with extra("the picture"):
        from gem_fast.paper.reports import table_plots
    prepare(args)
    spec = make_spec(args)
    download_data(args, *dict.fromkeys(experiment.config["data"] for experiment in spec.experiments))
    # Table 1 compares times, which must be measured side by side: it does not take runs of other tables.
    rows = run_experiments(spec.experiments, args, cache=f"{CACHE}/table1" if name == "table1" else CACHE)
    notes = spec.notes
    if any(experiment.config["data"] == MNIST_5K for experiment in spec.experiments):
        notes += (DIGITS,)
    if any(experiment.published_code for experiment in spec.experiments):
        notes += (CODE,)
    write_table(name, spec.title, notes, rows, spec.experiments, args, table_plots.DRAWINGS[name])


def _table1(args: argparse.Namespace) -> TableSpec:
    experiments = [
        Experiment(
            {"stream": stream, "learner": learner},
            _digits(args, stream, learner),
            ("seconds",),
            paper=PAPER_TABLE1.get((stream, learner), {}),
            published_code=_published_code(args, stream, learner, ("seconds",)),
        )
        for stream in ("permutations", "rotations")
        for learner in ("single", "independent", "multimodal", "ewc", "gem", "gem_pure_python", "agem")
        if (stream, learner) in PRESETS
    ]
    notes = ("Seconds of training without evaluation; the code's are with it.",)
    return TableSpec(f"Table 1: training time on {_name(args.data)} in seconds ({args.device})", experiments, notes)


def _table2(args: argparse.Namespace) -> TableSpec:
    experiments = []
    for learner in ("gem", "icarl"):
        for memory in MEMORIES:
            per_task = memory // _cifar_size(args)["tasks"]
            options = {"memory_per_task": per_task} if learner == "gem" else {"memory": memory}
            config = _cifar(args, learner, **options)
            paper = {} if args.cifar == STAND_IN else PAPER_TABLE2[learner, memory]
            experiments.append(Experiment({"learner": learner, "memory": memory}, config, ("acc",), paper=paper))
    return TableSpec(f"Table 2: ACC on {_cifar_name(args)} by the examples in memory", experiments)


def _table3(args: argparse.Namespace) -> TableSpec:
    experiments = []
    for learner in ("joint", "single", "independent", "multimodal", "ewc", "gem"):
        for epochs in (1, 2, 5):
            measures = ("acc",) if learner == "joint" else ("acc", "bwt")
            published_code = _published_code(args, "rotations", learner, measures) if epochs == 1 else {}
            paper = {name: PAPER_TABLE3[learner, epochs][name] for name in measures}
            config = _digits(args, "rotations", learner, epochs=epochs)
            condition = {"learner": learner, "epochs": epochs}
            experiments.append(Experiment(condition, config, measures, paper=paper, published_code=published_code))
    note = 'joint, the paper\'s "single, shuffled data", learns all tasks at once: the oracle.'
    title = f"Table 3: ACC and BWT on rotations of {_name(args.data)} by epochs per task"
    return TableSpec(title, experiments, (note, DIVIDED))


def _figure1(args: argparse.Namespace) -> TableSpec:
    experiments = []
    for stream in args.streams:
        for learner in ("single", "independent", "multimodal", "icarl", "ewc", "agem", "gem"):
            if (stream, learner) not in PRESETS or (learner == "icarl" and stream != "cifar100"):
                continue
            condition = {"stream": stream, "learner": learner}
            paper = PAPER_FIGURE1.get((stream, learner), {})
            published_code: Numbers = {}
            if stream == "cifar100":
                config = _cifar(args, learner)
                condition["stream"] = _cifar_name(args)
                paper = {} if args.cifar == STAND_IN else paper
            else:
                config = _digits(args, stream, learner)
                published_code = _published_code(args, stream, learner, MEASURES)
            experiments.append(Experiment(condition, config, MEASURES, True, paper, published_code))
    paper_note = "The paper's figure prints no numbers: here they are of the matrices of its Appendix B, divided by T."
    title = "Figure 1: ACC, BWT and FWT, and the first task along the stream"
    return TableSpec(title, experiments, (DIVIDED, paper_note))


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], TableSpec], str]] = {
    "table1": (_table1, "Table 1, the training time of all learners"),
    "table2": (_table2, "Table 2, ACC on CIFAR-100 by the size of the memory"),
    "table3": (_table3, "Table 3, ACC and BWT on rotations with 1, 2 and 5 epochs per task"),
    "figure1": (_figure1, "Figure 1, ACC, BWT and FWT of all learners on three streams"),
}


def _digits(args: argparse.Namespace, stream: str, learner: str, **options: Any) -> Config:
    size = QUICK if args.quick else {}
    options |= {"data": args.data, "data_root": args.data_root, "device": args.device}
    return configuration(stream, learner, **size, **options)


def _cifar(args: argparse.Namespace, learner: str, **options: Any) -> Config:
    if learner == "gem":
        options["memory_batch"] = args.memory_batch
    options |= {"data": args.cifar, "data_root": args.data_root, "device": args.device}
    return configuration("cifar100", learner, **_cifar_size(args), **options)


def _cifar_size(args: argparse.Namespace) -> dict[str, int]:
    return QUICK_CIFAR if args.quick else CIFAR


def _cifar_name(args: argparse.Namespace) -> str:
    return "a stand-in for CIFAR-100" if args.cifar == STAND_IN else "CIFAR-100"


def _published_code(args: argparse.Namespace, stream: str, learner: str, measures: Sequence[str]) -> Numbers:
    numbers = PUBLISHED_CODE.get((stream, learner), {}) if args.data == MNIST_5K else {}
    return {name: value for name, value in numbers.items() if name in measures}


def _name(data: str) -> str:
    return Path(data).resolve().name
