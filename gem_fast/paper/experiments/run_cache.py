"""The run cache: results of training runs stay in a folder, so that none is computed twice.

A run's file is named after its configuration. It holds that configuration, whether training diverged, and if not what
`result_of` returns. A command that was interrupted goes on with the runs that are missing; the one that it was busy
with goes on from its last checkpoint. Data are known by name: other data under an old name need a folder of their own.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from gem_fast.paper.errors import Diverged, InputError, extra, print_note
from gem_fast.paper.experiments.checkpoint import Checkpointer, Checkpoints
from gem_fast.paper.experiments.protocol import Record
from gem_fast.paper.experiments.training_run import RunConfig, TrainingRun, check_footprint, describe
from gem_fast.paper.files import prepare_folder, readable, write_files
from gem_fast.paper.reports.result import result_of, to_json
from gem_fast.paper.streams.config import load_data_of


def run_name(config: RunConfig) -> str:
    """The name of a run's file without its ending, such as rotations-gem-seed0-1f0c2a9b3d5e: the end is a hash."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return f"{config['stream']}-{config['learner']}-seed{config['seed']}-{digest[:12]}"


def run_cached(folder: Path, configs: Sequence[RunConfig]) -> list[Record | None]:
    """Computes the runs that are not in the cache yet, one after another, and shows on stderr how far it is.

    The folder is made if need be, and a configuration may come several times. Returns the measurements of each run, in
    order; None for one that diverged. Raises InputError where the folder cannot be written to or a run cannot be made
    or does not fit into memory, and KeyboardInterrupt with a sentence that says how many runs are finished.
    """
    prepare_folder("--out", folder)
    runs = {run_name(config): config for config in configs}
    records: dict[str, Record | None] = {}
    for name, config in runs.items():
        path = folder / f"{name}.json"
        if path.exists():
            try:
                records[name] = read_run(path, config)
            except InputError as error:
                print_note(f"{error}; it is computed anew")
    if records:
        print_note(f"{len(records)} of {len(runs)} runs are finished already in {folder}")
    missing = [config for name, config in runs.items() if name not in records]
    # Before any work: all data are sound, and every run fits into memory.
    data = {name: load_data_of(config) for name, config in {config["data"]: config for config in missing}.items()}
    for config in missing:
        check_footprint(config, data[config["data"]])
    del data
    try:
        for number, (name, config) in enumerate(runs.items(), start=1):
            if name not in records:
                title = f"run {number} of {len(runs)}: {describe(config)}"
                records[name] = _finish(folder / name, config, title)
    except KeyboardInterrupt as interrupt:
        so_far = f"{len(records)} of {len(runs)} runs are finished in {folder}"
        interrupt.args = (f"{so_far}; the same command goes on from there",)
        raise
    return [records[run_name(config)] for config in configs]


def read_run(path: Path, config: RunConfig) -> Record | None:
    """Reads the measurements of a finished run; None if training diverged.

    Raises InputError where the file cannot be read, is damaged, or is of another configuration.
    """
    with readable(path):
        contents = path.read_bytes()
    try:
        result = json.loads(contents)
        key, record = result["key"], None if result["diverged"] else Record.of(result)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged, or not the result of a run: {error!r}") from error
    if key != config:
        raise InputError(f"{path} is not the result of this run, but of another configuration")
    return record


def _finish(path: Path, config: RunConfig, title: str) -> Record | None:
    """Computes a run, or the rest of it, and writes the file `path`.json; returns None if training diverged."""
    with extra("the progress bar"):
        from gem_fast.paper.reports.progress import progress
    checkpoints = path.with_name(f"{path.name}.checkpoints")
    prepare_folder("--out", checkpoints)
    run = TrainingRun(config)
    checkpointer = Checkpointer(checkpoints, None, run)
    try:
        record = checkpointer.begin(resume=bool(Checkpoints(checkpoints).paths()))
    except InputError as error:
        print_note(f"{error}; the run starts from its beginning")
        shutil.rmtree(checkpoints)
        return _finish(path, config, title)
    result: dict[str, object] = {"key": config, "diverged": False}
    try:
        with progress(run.schedule, record, title) as show, checkpointer:
            record = run.run(show, checkpointer.after_batch, record=record)
        result |= result_of(record, run.config)
    except Diverged:
        result["diverged"], record = True, None
    write_files(path.parent, {f"{path.name}.json": to_json(result)})
    # Another command that was busy with the same run may have removed them first.
    shutil.rmtree(checkpoints, ignore_errors=True)
    return record
