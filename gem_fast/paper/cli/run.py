"""The subcommand run: one learner on one stream, the table of R at the end, files on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gem_fast.paper.cli.arguments import split_off
from gem_fast.paper.config import Options, Whole
from gem_fast.paper.errors import InputError, extra, flag
from gem_fast.paper.experiments.checkpoint import Checkpointer
from gem_fast.paper.experiments.signals import stopped
from gem_fast.paper.experiments.torchrun import Processes, started
from gem_fast.paper.experiments.training_run import TrainingRun, check_device, hyper_parameters
from gem_fast.paper.files import prepare_folder, write_files
from gem_fast.paper.learners import LEARNERS, LearnerName, SgdConfig
from gem_fast.paper.reports.result import result_of, summary, to_json
from gem_fast.paper.streams import StreamName
from gem_fast.paper.streams.config import STREAM_CONFIGS, StreamConfig, download_data

DESCRIPTION = (
    "Trains one learner on one stream of tasks, tests it on all tasks along the way and prints R, ACC, BWT and FWT "
    "(equations 2-4 of the paper). The defaults are the published settings. The options of another stream or learner "
    "are shown by --stream STREAM --learner LEARNER --help."
)


@dataclass(frozen=True, kw_only=True)
class Kinds(Options):
    """What is run; the other options and their defaults depend on it."""

    stream: StreamName = "rotations"
    """kind of tasks"""
    learner: LearnerName = "gem"
    """method"""


@dataclass(frozen=True, kw_only=True)
class Measuring(Options):
    """Running and measuring."""

    device: str = "cpu"
    """torch device, such as cuda or cuda:1"""
    eval_every: Whole | None = None
    """mini-batches between two evaluations; each task ends with one anyway; None: half a task's, none on cifar100"""
    out: Path | None = None
    """folder for result.json, r_matrix.png, first_task.png and curves.png; None: write nothing"""
    download: bool = False
    """let torchvision download the data set into --data-root, unless it is there"""


@dataclass(frozen=True, kw_only=True)
class Resuming(Options):
    """Going on after an interruption, with the same R to the last bit."""

    checkpoint: Path | None = None
    """folder for the state of this run, newest and last but one; None: keep none"""
    checkpoint_every: Whole | None = None
    """mini-batches between two checkpoints; None: as often as takes 2 % of the time"""
    resume: bool = False
    """go on from the newest sound checkpoint, with the same options; where there is none yet, begin"""


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """The options of run, in groups."""

    main: Kinds
    stream: StreamConfig
    learner: SgdConfig
    measuring: Measuring = field(default_factory=Measuring)
    resuming: Resuming = field(default_factory=Resuming)

    def run(self) -> None:
        """Trains in this process, or in all those that torchrun has started.

        Raises:
            InputError: An option cannot be used.
            KeyboardInterrupt: After SIGINT or SIGTERM.
        """
        with started(self.measuring.device) as mine:
            _train(self, mine)


def run_options(arguments: Sequence[str]) -> type[RunOptions]:
    """A RunOptions with the options of the stream and the learner that the subcommand's arguments name.

    Returns:
        The class, with the published settings as defaults.

    Raises:
        InputError: There is no such stream or learner, the learner is not for the stream, or an option is given that
            only others have.
    """
    kinds, others = split_off(Kinds, arguments)
    hyper = hyper_parameters(kinds.stream, kinds.learner, {})
    groups: dict[str, Options] = {
        "main": kinds,
        "stream": STREAM_CONFIGS[kinds.stream](),
        "learner": LEARNERS[kinds.learner].Config(**hyper),
    }
    mine = groups["stream"].names() + groups["learner"].names()
    of_others: dict[str, str] = {}
    for group, kind, known in (
        ("learner", kinds.learner, [learner.Config for learner in LEARNERS.values()]),
        ("stream", kinds.stream, list(STREAM_CONFIGS.values())),
    ):
        of_others |= {name: f"{group} {kind}" for config in known for name in config.names()}
    for argument in others:
        name = argument.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        if argument.startswith("--") and name in of_others and name not in mine:
            raise InputError(f"{flag(name)} is not an option of the {of_others[name]}")
    made: Any = make_dataclass(
        "Run",
        [(name, type(options), field(default=options)) for name, options in groups.items()],
        bases=(RunOptions,), frozen=True, kw_only=True,
    )  # fmt: skip
    return made  # type: ignore[no-any-return]


def _train(options: RunOptions, mine: Processes) -> None:
    """Checks everything first, then works: nobody should wait for an error."""
    measuring, resuming = options.measuring, options.resuming
    out, checkpoint = measuring.out, resuming.checkpoint
    if mine.size > 1 and checkpoint is not None:
        raise InputError(f"--checkpoint is for a run in one process, got {mine.size} processes of torchrun")
    shows = mine.rank == 0
    for option in ("resume", "checkpoint_every"):
        if getattr(resuming, option) and checkpoint is None:
            raise InputError(f"{flag(option)} needs --checkpoint DIR, got none")
    check_device(measuring.device)
    with extra("the progress bar"):
        from gem_fast.paper.reports.progress import Progress
    if out is not None:
        with extra("--out"):
            from gem_fast.paper.reports import run_plots
    if shows and measuring.download:
        download_data(options.stream.data_root, options.stream.data)
    if mine.size > 1:
        dist.barrier()
    config = asdict(options.main) | asdict(options.stream) | asdict(options.learner)
    run = TrainingRun(config | {"device": measuring.device, "eval_every": measuring.eval_every}, mine)
    if not shows:
        run.run()
        return
    for option, folder in (("--out", out), ("--checkpoint", checkpoint)):
        if folder is not None:
            prepare_folder(option, folder)
    checkpointer = so_far = None
    if checkpoint is not None:
        checkpointer = Checkpointer(checkpoint, resuming.checkpoint_every, run)
        so_far = checkpointer.begin(resuming.resume)
    print(", ".join(f"{name} {value}" for name, value in run.config.items()), flush=True)
    try:
        with Progress(run.schedule, so_far) as progress:
            if checkpointer is None:
                record = run.run(progress.after_batch)
            else:
                with checkpointer.signals:
                    record = run.run(progress.after_batch, checkpointer.after_batch, record=so_far)
    except KeyboardInterrupt as interrupt:
        if checkpointer is None or checkpointer.saved is None:
            raise
        saved = f"the run is saved in {checkpoint} up to mini-batch {checkpointer.saved}"
        raise stopped(interrupt, f"{saved}; the same command with --resume goes on from there") from interrupt
    files = {}
    try:
        print(f"\n{summary(record)}", flush=True)
    finally:  # what was computed is kept, whatever became of the terminal
        if out is not None:
            files = run_plots.draw_all(record, _title(options, run))
            # It comes last: where it is, the run is complete.
            files["result.json"] = to_json(result_of(record, run.config))
            write_files(out, files)
    if files and out is not None:
        print(f"written: {', '.join(str(out / name) for name in files)}")


def _title(options: RunOptions, run: TrainingRun) -> str:
    tasks = "1 task" if run.stream.n_tasks == 1 else f"{run.stream.n_tasks} tasks"
    data = Path(run.stream.data).resolve().name
    told = f", descriptor {options.stream.descriptor}" if options.stream.descriptor else ""
    return f"{options.main.learner} on {options.main.stream} of {data}, {tasks}{told}, seed {options.stream.seed}"
