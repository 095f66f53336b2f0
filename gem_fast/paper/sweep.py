"""What all commands of many cells share: their options, the way from lines to rows, and the files they leave."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gem_fast.paper import report
from gem_fast.paper.cells import run_cells
from gem_fast.paper.data import MNIST_5K, SAYS_STAND_IN, load_data
from gem_fast.paper.experiment import Config, check_device
from gem_fast.paper.files import prepare_folder
from gem_fast.paper.protocol import Record
from gem_fast.paper.published import MEASURES, Numbers
from gem_fast.paper.sheets import Row, Sheet, spreads

__all__ = ["Line", "add_data_option", "add_options", "is_stand_in", "labels", "make_rows", "prepare", "seeds", "write"]


@dataclass(frozen=True)
class Line:
    """One line of a table before it is computed.

    Attributes:
        of: What the line is of, by name.
        config: The configuration, but for the seed.
        measures: Which of acc, bwt, fwt and seconds are told.
        first_task: Whether the curve of the first task is told.
        paper: As in Row.
        published_code: As in Row.
    """

    of: dict[str, Any]
    config: Config
    measures: Sequence[str] = MEASURES
    first_task: bool = False
    paper: Numbers = field(default_factory=dict)
    published_code: Numbers = field(default_factory=dict)


def add_options(parser: argparse.ArgumentParser, default_seeds: Sequence[int]) -> None:
    """Adds the options that all commands of many cells have.

    Args:
        parser: The command's parser.
        default_seeds: What --seeds is if it is not given.
    """
    parser.add_argument("--quick", action="store_true", help="less of everything: a check that it works (default: no)")
    first, last = default_seeds[0], default_seeds[-1]
    text = f"{first}-{last}" if last > first else str(first)
    parser.add_argument(
        "--seeds",
        type=seeds,
        metavar="A-B",
        help=f"seeds from A to B, or one seed, or several with commas (default: {text}; with --quick at most 0-1)",
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="torch device (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the results, shared by all tables (default: out/paper, with --quick out/paper-quick)",
    )
    parser.set_defaults(default_seeds=tuple(default_seeds))


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option --data."""
    parser.add_argument(
        "--data",
        default=MNIST_5K,
        metavar="DATA",
        help="digits for rotations and permutations, as for the command run (default: %(default)s)",
    )


def seeds(text: str) -> tuple[int, ...]:
    """Reads seeds, such as 0-4, 3 or 0,2.

    Args:
        text: The option's text.

    Returns:
        The seeds, at least one, all different.

    Raises:
        argparse.ArgumentTypeError: It is of another form.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not 0 < len(span) <= 1000:
            raise argparse.ArgumentTypeError(f"must be seeds such as 0-4, 3 or 0,2, got {text!r}")
        found += span
    return tuple(dict.fromkeys(found))


def prepare(args: argparse.Namespace) -> None:
    """Checks the options, and fills in those that depend on --quick.

    Args:
        args: The parsed options of `add_options`.

    Raises:
        InputError: A device or a folder cannot be used.
    """
    check_device(args.device)
    if args.seeds is None:
        args.seeds = args.default_seeds[:2] if args.quick else args.default_seeds
    if args.out is None:
        args.out = Path("out/paper-quick" if args.quick else "out/paper")
    prepare_folder("--out", args.out)


def make_rows(
    lines: Sequence[Line], args: argparse.Namespace, *, cells: str = "cells", may_diverge: bool = False
) -> list[Row]:
    """Computes what is missing of a table.

    Args:
        lines: The lines.
        args: With the seeds and the folder.
        cells: The folder of the cells within args.out.
        may_diverge: As for `run_cells`; a line of which one seed diverged has no measures.

    Returns:
        A row for each line.

    Raises:
        InputError: As `run_cells`.
        KeyboardInterrupt: As `run_cells`.
    """
    # Seed by seed, so that all methods meet the same moods of the machine.
    configs = [line.config | {"seed": seed} for seed in args.seeds for line in lines]
    records = run_cells(args.out / cells, configs, may_diverge=may_diverge)
    rows = []
    for i, line in enumerate(lines):
        mine = [record for record in records[i :: len(lines)] if record is not None]
        ours, curve = {}, None
        if len(mine) == len(args.seeds):
            ours = spreads([{name: _measure(record, name) for name in line.measures} for record in mine])
            curve = _first_task(mine) if line.first_task else None
        rows.append(Row(line.of, ours, line.paper, line.published_code, curve))
    return rows


def write(sheet: Sheet, picture: bytes | None, folder: Path) -> None:
    """Writes a sheet's files, the JSON last, and prints it.

    Args:
        sheet: The sheet.
        picture: A PNG file, if it has one.
        folder: An existing folder.

    Raises:
        InputError: A file cannot be written.
    """
    files = {f"{sheet.name}.md": sheet.markdown()}
    if picture is not None:
        files[f"{sheet.name}.png"] = picture
    files[f"{sheet.name}.json"] = report.to_json(sheet.to_plain())
    report.write_files(folder, files)
    print(sheet.terminal())
    print(f"written: {', '.join(str(folder / name) for name in files)}")


def labels(args: argparse.Namespace, lines: Sequence[Line]) -> tuple[str, ...]:
    """What must be said of a table wherever it is shown.

    Args:
        args: With `quick`.
        lines: The lines.

    Returns:
        Sentences.
    """
    sentences = []
    if args.quick:
        sentences.append("QUICK: few tasks, examples and seeds, a check that all works; not comparable with the paper.")
    if any(is_stand_in(line.config["data"]) for line in lines):
        sentences.append(
            "STAND-IN: cifar100 is made-up images in CIFAR-100's format; its numbers say nothing of CIFAR-100."
        )
    return tuple(sentences)


@functools.cache
def is_stand_in(data: str) -> bool:
    """Whether data are made up, by what they say of themselves."""
    return data != MNIST_5K and load_data(data).name.endswith(SAYS_STAND_IN)


def _measure(record: Record, name: str) -> float:
    return record.train_seconds if name == "seconds" else float(getattr(record, name))


def _first_task(records: list[Record]) -> Any:
    x = np.append(0, records[0].batch) * len(records[0].baseline) / records[0].batch[-1]
    curves = [np.append(record.baseline[0], record.accuracy[:, 0]) for record in records]
    points = spreads([{str(i): float(value) for i, value in enumerate(curve)} for curve in curves])
    return tuple(x.tolist()), tuple(points.values())
