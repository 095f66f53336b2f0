"""Cells: experiments whose results stay in a folder, so that none is computed twice.

A cell's file is named after its configuration, and holds what `report.result_of` returns. A command that was
interrupted goes on with the cells that are missing, and within the cell that it was busy with, from that one's last
checkpoint. Data are known by name: other data under an old name need a folder of their own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from gem_fast.paper import report
from gem_fast.paper.errors import Diverged, InputError, extra
from gem_fast.paper.experiment import Config, Experiment
from gem_fast.paper.files import prepare_folder
from gem_fast.paper.protocol import Record
from gem_fast.paper.resume import Resumable

__all__ = ["cell_name", "read_cell", "run_cells"]


def cell_name(config: Config) -> str:
    """The name of a cell's file, without its ending: readable in front, and a hash of the whole configuration.

    Args:
        config: What `configuration` returned.

    Returns:
        Such as rotations-gem-seed0-1f0c2a9b3d5e.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return f"{config['stream']}-{config['learner']}-seed{config['seed']}-{digest[:12]}"


def run_cells(
    folder: Path,
    configs: Sequence[Config],
    *,
    may_diverge: bool = False,
) -> list[Record | None]:
    """Computes the cells that are not finished yet, one after another, and says on stderr how far it is.

    Args:
        folder: Where the cells are; made if need be.
        configs: What `configuration` returned, for each cell; the same one may come several times.
        may_diverge: Whether a cell whose training diverges is a result, too; otherwise it is an error.

    Returns:
        The measurements of each cell, in the order of `configs`; None for one that diverged.

    Raises:
        InputError: The folder cannot be written to, an experiment cannot be made, or one diverged and must not.
        KeyboardInterrupt: With a sentence that says how many cells are finished.
    """
    prepare_folder("--out", folder)
    cells = {cell_name(config): config for config in configs}
    results: dict[str, Record | None] = {}
    for name, config in cells.items():
        path = folder / f"{name}.json"
        if path.exists():
            try:
                results[name] = read_cell(path, config)
            except InputError as error:
                _say(f"{error}; it is computed anew")
    if results:
        _say(f"{len(results)} of {len(cells)} cells are finished already in {folder}")
    try:
        for number, (name, config) in enumerate(cells.items(), start=1):
            if name in results:
                continue
            title = f"cell {number} of {len(cells)}: {_describe(config)}"
            results[name] = _finish(folder / name, config, title)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"{len(results)} of {len(cells)} cells are finished in {folder}; the same command goes on from there"
        ) from interrupt
    if not may_diverge:
        for name, config in cells.items():
            if results[name] is None:
                raise InputError(f"{_describe(config)}: training diverged, as {folder / name}.json says")
    return [results[cell_name(config)] for config in configs]


def read_cell(path: Path, config: Config) -> Record | None:
    """Reads a finished cell.

    Args:
        path: The file.
        config: The configuration that it must be of.

    Returns:
        The measurements; None if training diverged.

    Raises:
        InputError: The file cannot be read, is damaged, or is of another configuration.
    """
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is not JSON" if isinstance(error, ValueError | RecursionError) else error.strerror or error
        raise InputError(f"{path} cannot be read as the result of a cell: {reason}") from error
    if not isinstance(result, dict) or result.get("cell") != config:
        raise InputError(f"{path} is not the result of this cell, but of another configuration")
    if result.get("diverged") is True:
        return None
    try:
        return report.record_of(result)
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def _finish(path: Path, config: Config, title: str) -> Record | None:
    """Runs the rest of a cell, and writes its file; returns None if it diverged."""
    with extra("the progress bar"):
        from gem_fast.paper.progress import Progress
    checkpoints = path.with_name(f"{path.name}.checkpoints")
    prepare_folder("--out", checkpoints)
    experiment = Experiment(config)
    run = Resumable(checkpoints, None, experiment)
    try:
        journal = run.begin(resume=any(checkpoints.glob("checkpoint-*.gem")))
    except InputError as error:
        _say(f"{error}; the cell starts from its beginning")
        shutil.rmtree(checkpoints)
        return _finish(path, config, title)
    result: Config = {"cell": config, "diverged": False}
    record: Record | None = None
    try:
        with Progress(experiment.schedule, 0 if journal is None else journal.batches, title) as bar:
            record = experiment.run(on_batch=bar.on_batch, on_journal=run.after_batch, journal=journal)
        result |= report.result_of(record, experiment.config)
    except Diverged:
        result["diverged"] = True
    report.write_files(path.parent, {f"{path.name}.json": report.to_json(result)})
    # Another command that was busy with the same cell may have been first.
    shutil.rmtree(checkpoints, ignore_errors=True)
    return record


def _describe(config: Config) -> str:
    epochs = "" if config["epochs"] == 1 else f", {config['epochs']} epochs"
    return f"{config['learner']} on {config['stream']}{epochs}, seed {config['seed']}"


def _say(sentence: str) -> None:
    print(f"python -m gem_fast: {sentence}", file=sys.stderr, flush=True)
