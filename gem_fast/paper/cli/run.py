"""The subcommand run: one learner on one stream, the table of R at the end, files on request."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gem_fast.paper.cli.learner_options import add_learner_options, learner_options
from gem_fast.paper.cli.numbers import whole
from gem_fast.paper.cli.stream_options import add_stream_options, download_data, stream_config
from gem_fast.paper.errors import InputError, extra, flag
from gem_fast.paper.experiments.resume import Checkpointer
from gem_fast.paper.experiments.signals import stopped
from gem_fast.paper.experiments.torchrun import Processes, started
from gem_fast.paper.experiments.training_run import TrainingRun, check_device, hyper_parameters
from gem_fast.paper.files import prepare_folder
from gem_fast.paper.reports.result import result_of, summary, to_json, write_files

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to the command line.

    Args:
        subparsers: What argparse's add_subparsers returned.
    """
    parser = subparsers.add_parser(
        "run",
        help="train one learner on one stream of tasks",
        description="Trains one learner on one stream of tasks, tests it on all tasks along the way and prints R, ACC, "
        "BWT and FWT (equations 2-4 of the paper). The defaults are the published settings.",
        allow_abbrev=False,
    )
    parser.set_defaults(command=run)
    add_stream_options(parser)
    add_learner_options(parser.add_argument_group("the learner (defaults depend on the stream)"))

    measure = parser.add_argument_group("running and measuring")
    measure.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="torch device, such as cuda or cuda:1 (default: %(default)s)"
    )
    measure.add_argument(
        "--eval-every",
        type=whole(1),
        metavar="N",
        help="mini-batches between two evaluations on all tasks, besides the one at the end of each task; "
        "its time is reported apart (default: half of a task's mini-batches; none on cifar100)",
    )
    measure.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for result.json, r_matrix.png, first_task.png and curves.png (default: write nothing)",
    )

    again = parser.add_argument_group("going on after an interruption, with the same R to the last bit")
    again.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="folder for the state of this run, newest and last but one (default: keep none)",
    )
    again.add_argument(
        "--checkpoint-every",
        type=whole(1),
        metavar="N",
        help="mini-batches between two checkpoints (default: as often as takes 2 %% of the time)",
    )
    again.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest sound checkpoint, with the options that the run was started with (default: begin, "
        "in a folder without checkpoints; where there are none yet, --resume begins, too)",
    )


def run(args: argparse.Namespace) -> None:
    """Trains in this process, or in all those that torchrun has started.

    Args:
        args: The parsed options.

    Raises:
        InputError: An option cannot be used.
        KeyboardInterrupt: After SIGINT or SIGTERM.
    """
    with started(args.device) as mine:
        _train(args, mine)


def _train(args: argparse.Namespace, mine: Processes) -> None:
    """Checks everything first, then works: nobody should wait for an error."""
    if mine.size > 1 and args.checkpoint is not None:
        raise InputError(f"--checkpoint is for a run in one process, got {mine.size} processes of torchrun")
    shows = mine.rank == 0
    hyper = hyper_parameters(args.stream, args.learner, learner_options(args))
    for option in ("resume", "checkpoint_every"):
        if getattr(args, option) and args.checkpoint is None:
            raise InputError(f"{flag(option)} needs --checkpoint DIR, got none")
    check_device(args.device)
    with extra("the progress bar"):
        from gem_fast.paper.reports.progress import Progress
    if args.out is not None:
        with extra("--out"):
            from gem_fast.paper.reports import run_plots
    config = stream_config(args)
    if shows:
        download_data(args, config["data"])
    if mine.size > 1:
        dist.barrier()
    options = config | {"device": args.device, "learner": args.learner}
    training_run = TrainingRun(options | hyper | {"eval_every": args.eval_every}, mine)
    for option in ("out", "checkpoint"):
        if getattr(args, option) is not None and shows:
            prepare_folder(flag(option), getattr(args, option))
    checkpointer = journal = None
    if args.checkpoint is not None:
        checkpointer = Checkpointer(args.checkpoint, args.checkpoint_every, training_run)
        journal = checkpointer.begin(args.resume)
    if not shows:
        training_run.run()
        return
    print(", ".join(f"{name} {value}" for name, value in training_run.config.items()), flush=True)
    learned = 0 if journal is None else journal.batches
    try:
        signals = contextlib.nullcontext() if checkpointer is None else checkpointer.signals
        with Progress(training_run.schedule, learned) as progress, signals:
            record = training_run.run(
                on_batch=progress.on_batch,
                on_journal=(lambda journal: None) if checkpointer is None else checkpointer.after_batch,
                journal=journal,
            )
    except KeyboardInterrupt as interrupt:
        if checkpointer is None or checkpointer.saved is None:
            raise
        raise stopped(
            interrupt,
            f"the run is saved in {args.checkpoint} up to mini-batch {checkpointer.saved}; the same command with "
            "--resume goes on from there",
        ) from interrupt
    files = {}
    try:
        print(f"\n{summary(record)}", flush=True)
    finally:  # what was computed is kept, whatever became of the terminal
        if args.out is not None:
            files = run_plots.draw_all(record, _title(args, training_run))
            # It comes last: where it is, the run is complete.
            files["result.json"] = to_json(result_of(record, training_run.config))
            write_files(args.out, files)
    if files:
        print(f"written: {', '.join(str(args.out / name) for name in files)}")


def _title(args: argparse.Namespace, run: TrainingRun) -> str:
    tasks = "1 task" if run.stream.n_tasks == 1 else f"{run.stream.n_tasks} tasks"
    return f"{args.learner} on {args.stream} of {Path(run.stream.data).resolve().name}, {tasks}, seed {args.seed}"
