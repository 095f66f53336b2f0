"""The subcommand run: one learner on one stream, the table of R at the end, files on request."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from gem_fast.paper import report
from gem_fast.paper.data import MNIST_5K, load_data
from gem_fast.paper.errors import InputError, extra
from gem_fast.paper.files import prepare_folder
from gem_fast.paper.learners import LEARNERS
from gem_fast.paper.options import add_learner_options, hyper_parameters, whole
from gem_fast.paper.presets import ARCHITECTURE
from gem_fast.paper.protocol import learn_stream
from gem_fast.paper.resume import Resumable
from gem_fast.paper.setting import Setting
from gem_fast.paper.streams import STREAMS

__all__ = ["add_parser"]

EVALUATIONS_PER_TASK = 2


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
    parser.set_defaults(command=_run)
    positive = whole(1)

    stream = parser.add_argument_group("the stream of tasks")
    stream.add_argument("--stream", choices=STREAMS, default="rotations", help="kind of tasks (default: %(default)s)")
    stream.add_argument(
        "--data",
        default=MNIST_5K,
        metavar="DATA",
        help=f"{MNIST_5K}, 5000 real MNIST digits, or a folder with the four IDX files of MNIST, Fashion-MNIST, KMNIST "
        "or EMNIST (default: %(default)s)",
    )
    stream.add_argument(
        "--tasks", type=positive, default=20, metavar="T", help="number of tasks (default: %(default)s)"
    )
    stream.add_argument(
        "--samples-per-task",
        type=positive,
        default=1000,
        metavar="N",
        help="training examples of each task (default: %(default)s)",
    )
    stream.add_argument(
        "--batch-size", type=positive, default=10, metavar="N", help="examples per mini-batch (default: %(default)s)"
    )
    stream.add_argument(
        "--epochs",
        type=positive,
        default=1,
        metavar="N",
        help="passes over a task's examples before the next task begins (default: %(default)s)",
    )
    stream.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of the stream, of the order of the examples and of the initial weights (default: %(default)s)",
    )

    add_learner_options(parser.add_argument_group("the learner (defaults depend on the stream)"))

    measure = parser.add_argument_group("running and measuring")
    measure.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="torch device, such as cuda or cuda:1 (default: %(default)s)"
    )
    measure.add_argument(
        "--eval-every",
        type=positive,
        metavar="N",
        help="mini-batches between two evaluations on all tasks, besides the one at the end of each task; its time is "
        "reported apart (default: half of a task's mini-batches)",
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
        type=positive,
        metavar="N",
        help="mini-batches between two checkpoints (default: as often as takes 2 %% of the time)",
    )
    again.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest sound checkpoint, with the options that the run was started with (default: begin, "
        "in a folder without checkpoints; where there are none yet, --resume begins, too)",
    )


def _run(args: argparse.Namespace) -> None:
    """Checks everything first, then works: nobody should wait for an error."""
    hyper = hyper_parameters(args)
    for option in ("resume", "checkpoint_every"):
        if getattr(args, option) and args.checkpoint is None:
            raise InputError(f"--{option.replace('_', '-')} needs --checkpoint DIR, got none")
    device = _device(args.device)
    with extra("the progress bar"):
        from gem_fast.paper.progress import Progress
    if args.out is not None:
        with extra("--out"):
            from gem_fast.paper import plots
    generator = torch.Generator().manual_seed(args.seed)
    stream = STREAMS[args.stream](load_data(args.data), args.tasks, args.samples_per_task, generator).to(device)
    for option in ("out", "checkpoint"):
        if getattr(args, option) is not None:
            prepare_folder(f"--{option}", getattr(args, option))

    batches_per_task = args.epochs * math.ceil(args.samples_per_task / args.batch_size)
    eval_every = args.eval_every or math.ceil(batches_per_task / EVALUATIONS_PER_TASK)
    names = ("stream", "data", "tasks", "samples_per_task", "batch_size", "epochs", "seed", "device", "learner")
    config = {name: getattr(args, name) for name in names} | hyper | {"eval_every": eval_every}

    torch.manual_seed(args.seed)
    learner = LEARNERS[args.learner](Setting.of(stream, ARCHITECTURE[args.stream]), device, **hyper)
    run = journal = None
    if args.checkpoint is not None:
        run = Resumable(args.checkpoint, args.checkpoint_every, config, stream, learner, batches_per_task)
        journal = run.begin(args.resume)
    print(", ".join(f"{name} {value}" for name, value in config.items()))
    learned = 0 if journal is None else journal.batches
    try:
        with Progress(args.tasks, batches_per_task, learned) as progress:
            record = learn_stream(
                learner,
                stream,
                batch_size=args.batch_size,
                epochs=args.epochs,
                eval_every=eval_every,
                generator=generator,
                on_batch=progress.on_batch,
                on_journal=(lambda journal: None) if run is None else run.after_batch,
                journal=journal,
            )
    except KeyboardInterrupt as interrupt:
        if run is None or run.saved is None:
            raise
        raise KeyboardInterrupt(
            f"the run is saved in {args.checkpoint} up to mini-batch {run.saved}; the same command with --resume goes "
            "on from there"
        ) from interrupt
    print(f"\n{report.summary(record)}")
    if args.out is not None:
        tasks = "1 task" if args.tasks == 1 else f"{args.tasks} tasks"
        title = f"{args.learner} on {args.stream} of {Path(args.data).resolve().name}, {tasks}, seed {args.seed}"
        # result.json comes last: where it is, the run is complete.
        files = plots.draw_all(record, title) | {"result.json": report.result_json(record, config)}
        report.write_files(args.out, files)
        print(f"written: {', '.join(str(args.out / name) for name in files)}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch raises many kinds here; whatever it is, this device is of no use
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--device must be a device torch can use here, got {name!r}: {reason}") from error
    return device
