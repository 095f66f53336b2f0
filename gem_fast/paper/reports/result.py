"""What a run leaves behind: the table for the terminal, and result.json."""

import json
import platform
from typing import Any

import numpy as np
import torch

import gem_fast
from gem_fast.paper.experiments.protocol import Record


def summary(record: Record) -> str:
    """The table of R and the measures, for people: 10 + 4 T characters wide; tasks count from 1, as in the paper."""
    rows = {"untrained": record.baseline} | {f"task {task}": row for task, row in enumerate(record.R, start=1)}
    return "\n".join(
        [
            "Accuracy in % on each task (columns) after learning each task (rows)",
            "",
            _row("", range(1, len(record.baseline) + 1)),
            *(_row(label, [round(100 * accuracy) for accuracy in row]) for label, row in rows.items()),
            "",
            f"ACC {record.acc:.4f}   BWT {record.bwt:+.4f}   FWT {record.fwt:+.4f}",
            f"training {record.train_seconds:.2f} s   evaluation {record.eval_seconds:.2f} s",
        ]
    )


def result_of(record: Record, config: dict[str, Any]) -> dict[str, Any]:
    """What result.json holds, as plain values; tasks count from 0, the rows of R and the curves are in order of time.

    Accuracies are fractions between 0 and 1, `curves.batch` counts the mini-batches learned before each evaluation, and
    `config` has every option of the run by name.
    """
    return {
        "acc": record.acc,
        "bwt": record.bwt,
        "fwt": record.fwt,
        # Joint training sees all tasks from the start.
        "zero_shot": None if config.get("learner") == "joint" else record.zero_shot,
        "R": record.R.tolist(),
        **record.to_dict(),
        "config": config,
        "versions": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "gem_fast": gem_fast.build_info(),
        },
    }


def to_json(value: Any) -> bytes:
    """Plain values as a JSON file, UTF-8."""
    return json.dumps(value, indent=1).encode() + b"\n"


def _row(label: str, numbers: Any) -> str:
    return f"{label:>10}" + "".join(f"{number:4d}" for number in numbers)
