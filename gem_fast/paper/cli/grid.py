"""The subcommand grid: a search over hyper-parameters, as in Appendix A of the paper."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from gem_fast.paper.cli.learner_options import OPTIONS
from gem_fast.paper.cli.stream_options import add_data_options, download_data
from gem_fast.paper.data import MNIST_5K
from gem_fast.paper.errors import InputError, extra, flag
from gem_fast.paper.experiments.presets import PRESETS
from gem_fast.paper.experiments.runner import Experiment, add_options, prepare, run_experiments, write_table
from gem_fast.paper.experiments.training_run import configuration
from gem_fast.paper.learners import LEARNERS
from gem_fast.paper.reports.result_table import Row
from gem_fast.paper.streams import STREAMS

__all__ = ["add_parser"]

# The values that are tried where none are given, those of the published runs among them. A hyper-parameter that is not
# here keeps its published value.
GRID: dict[str, tuple[float, ...]] = {
    "lr": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "margin": tuple(tenths / 10 for tenths in range(11)),
    "strength": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
}
QUICK_GRID: dict[str, tuple[float, ...]] = {"lr": (0.01, 0.1), "margin": (0.0, 0.5), "strength": (1.0, 100.0)}
QUICK_SIZE = {"tasks": 4, "samples_per_task": 100}
SEARCHED = ("lr", "memory_per_task", "memory", "margin", "strength")


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to the command line.

    Args:
        subparsers: What argparse's add_subparsers returned.
    """
    parser = subparsers.add_parser(
        "grid",
        help="search over hyper-parameters, best by ACC (Appendix A)",
        description="Tries all combinations of hyper-parameters of each learner, prints them sorted by ACC, and writes "
        "grid-STREAM-LEARNER.json and .md. An interrupted command goes on where it was, and one with more values "
        "computes only what is new.",
        allow_abbrev=False,
    )
    parser.set_defaults(command=_run)
    parser.add_argument("--stream", choices=STREAMS, default="rotations", help="kind of tasks (default: %(default)s)")
    parser.add_argument(
        "--learner", choices=LEARNERS, nargs="+", default=["gem"], help="one or more methods (default: gem)"
    )
    add_data_options(parser, MNIST_5K, MNIST_5K)
    for name in SEARCHED:
        parse, metavar, text = OPTIONS[name]
        values = " ".join(f"{value:g}" for value in GRID.get(name, ())) or "the published one"
        parser.add_argument(
            flag(name),
            type=parse,
            nargs="+",
            metavar=metavar,
            help=f"values of: {text} (default: {values})",
        )
    add_options(parser, default_seeds=(0,))


def _run(args: argparse.Namespace) -> None:
    with extra("the grid"):
        import tqdm  # noqa: F401
    experiments = {learner: _experiments(args, learner) for learner in dict.fromkeys(args.learner)}
    download_data(args, args.data)
    data = Path(args.data).resolve().name
    prepare(args)
    for learner, combinations in experiments.items():
        rows = run_experiments(combinations, args, may_diverge=True)
        rows.sort(key=lambda row: row.ours["acc"].mean if row.ours else -1.0, reverse=True)
        title = f"Grid search: {learner} on {args.stream} of {data}, {len(rows)} combinations, best ACC first"
        write_table(f"grid-{args.stream}-{learner}", title, (_best(rows),), rows, combinations, args)


def _experiments(args: argparse.Namespace, learner: str) -> list[Experiment]:
    preset = PRESETS.get((args.stream, learner), {})
    given = {name: getattr(args, name) for name in SEARCHED if getattr(args, name) is not None}
    for name in given:
        if name not in preset and not any(name in PRESETS.get((args.stream, other), {}) for other in args.learner):
            raise InputError(f"{flag(name)} is not an option of {', '.join(args.learner)}")
    default = QUICK_GRID if args.quick else GRID
    values = {name: given.get(name) or default.get(name) or (preset[name],) for name in SEARCHED if name in preset}
    size = QUICK_SIZE if args.quick else {}
    return [
        Experiment(
            point,
            configuration(
                args.stream, learner, data=args.data, data_root=args.data_root, device=args.device, **size, **point
            ),
        )
        for point in (dict(zip(values, numbers, strict=True)) for numbers in itertools.product(*values.values()))
    ]


def _best(rows: list[Row]) -> str:
    if not rows[0].ours:
        return "All combinations diverged."
    return f"Best by ACC: {', '.join(f'{name} {value:g}' for name, value in rows[0].condition.items())}."
