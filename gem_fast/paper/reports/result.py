"""What a run leaves behind: the table for the terminal, and the files of --out."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gem_fast
from gem_fast.paper.errors import InputError
from gem_fast.paper.experiments.protocol import Record
from gem_fast.paper.files import write_file

__all__ = ["record_of", "result_of", "summary", "to_json", "write_files"]


def summary(record: Record) -> str:
    """The table of R and the measures, for people; tasks count from 1, as in the paper.

    Args:
        record: The measurements of a run.

    Returns:
        Several lines; with T tasks they are 10 + 4 T characters wide.
    """
    lines = ["Accuracy in % on each task (columns) after learning each task (rows)", ""]
    lines.append(_row("", list(range(1, len(record.baseline) + 1))))
    lines.append(_row("untrained", _percent(record.baseline)))
    lines += [_row(f"task {task}", _percent(row)) for task, row in enumerate(record.R, start=1)]
    lines += [
        "",
        f"ACC {record.acc:.4f}   BWT {record.bwt:+.4f}   FWT {record.fwt:+.4f}",
        f"training {record.train_seconds:.2f} s   evaluation {record.eval_seconds:.2f} s",
    ]
    return "\n".join(lines)


def result_of(record: Record, config: dict[str, Any]) -> dict[str, Any]:
    """What result.json holds; tasks count from 0, the rows of R and the lists of curves are in order of time.

    Args:
        record: The measurements of a run.
        config: Every option of the run by name.

    Returns:
        Plain values. Accuracies are fractions between 0 and 1, `curves.batch` counts the mini-batches learned before
        each evaluation.
    """
    return {
        "acc": record.acc,
        "bwt": record.bwt,
        "fwt": record.fwt,
        "R": record.R.tolist(),
        "baseline": record.baseline.tolist(),
        "seconds": {"train": record.train_seconds, "eval": record.eval_seconds},
        "config": config,
        "versions": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "gem_fast": gem_fast.build_info(),
        },
        "curves": {
            "batch": record.batch.tolist(),
            "task": record.task.tolist(),
            "accuracy": record.accuracy.tolist(),
        },
    }


def to_json(value: Any) -> bytes:
    """Plain values as a JSON file, UTF-8."""
    return json.dumps(value, indent=1).encode() + b"\n"


def record_of(result: Any) -> Record:
    """The measurements that a result.json holds.

    Args:
        result: What json.loads makes of it, perhaps of a damaged file.

    Returns:
        The record that it was written from.

    Raises:
        ValueError: A part is missing or not what it should be.
    """
    try:
        curves, seconds = result["curves"], result["seconds"]
        record = Record(
            baseline=np.array(result["baseline"], dtype=np.float64),
            accuracy=np.array(curves["accuracy"], dtype=np.float64),
            batch=np.array(curves["batch"], dtype=np.int64),
            task=np.array(curves["task"], dtype=np.int64),
            train_seconds=float(seconds["train"]),
            eval_seconds=float(seconds["eval"]),
        )
        fractions = np.concatenate([record.baseline, record.accuracy.ravel()])
        consistent = (
            record.R.shape[1:] == record.baseline.shape
            and record.batch.shape == record.task.shape
            and fractions.min() >= 0
            and fractions.max() <= 1
            and math.isfinite(record.train_seconds + record.eval_seconds)
            and record.acc == result["acc"]
        )
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"a part is missing or of another type ({error})") from error
    if not consistent:
        raise ValueError("its parts do not fit together")
    return record


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Writes files one after another, each of them whole or not at all.

    Args:
        folder: An existing folder; files of the same name in it are replaced.
        files: Contents by name.

    Raises:
        InputError: A file cannot be written.
    """
    for name, contents in files.items():
        try:
            write_file(folder / name, contents)
        except OSError as error:
            raise InputError(f"{folder / name} cannot be written: {error.strerror or error}") from error


def _percent(row: np.ndarray[Any, np.dtype[np.float64]]) -> list[int]:
    return [round(100 * accuracy) for accuracy in row]


def _row(label: str, numbers: list[int]) -> str:
    return f"{label:>10}" + "".join(f"{number:4d}" for number in numbers)
