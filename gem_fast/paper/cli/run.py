"""The subcommand run: one learner on one stream, the table of R at the end, files on request."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, field
from pathlib import Path

import torch.distributed as dist

from gem_fast.paper.cli.arguments import read
from gem_fast.paper.config import Options, Whole
from gem_fast.paper.data import download
from gem_fast.paper.errors import InputError, extra, flag
from gem_fast.paper.experiments.checkpoint import Checkpointer
from gem_fast.paper.experiments.torchrun import Processes, started
from gem_fast.paper.experiments.training_run import TrainingRun, check_device, describe, hyper_parameters
from gem_fast.paper.files import prepare_folder, write_files
from gem_fast.paper.learners import LEARNERS, LearnerName, SgdConfig
from gem_fast.paper.reports.result import result_of, summary, to_json
from gem_fast.paper.streams import StreamName
from gem_fast.paper.streams.config import STREAM_CONFIGS, StreamConfig

DESCRIPTION = (
    "Trains one learner on one stream of tasks, tests it on all tasks along the way and prints R, ACC, BWT and FWT "
    "(equations 2-4 of the paper). The defaults are the published settings. The options of another stream or learner "
    "are shown by --stream STREAM --learner LEARNER --help."
)


class Kinds(Options):
    """What is run; the other options and their defaults depend on it."""

    stream: StreamName = "rotations"
    """kind of tasks"""
    learner: LearnerName = "gem"
    """method"""


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


class Resuming(Options):
    """Going on after an interruption, with the same R to the last bit."""

    checkpoint: Path | None = None
    """folder for the state of this run, newest and last but one; None: keep none"""
    checkpoint_every: Whole | None = None
    """mini-batches between two checkpoints; None: as often as takes 2 % of the time"""
    resume: bool = False
    """go on from the newest sound checkpoint, with the same options; where there is none yet, begin"""


class RunOptions(Options):
    """The options of run, in groups."""

    main: Kinds
    stream: StreamConfig
    learner: SgdConfig
    measuring: Measuring = field(default_factory=Measuring)
    resuming: Resuming = field(default_factory=Resuming)

    def run(self) -> None:
        """Trains in this process, or in all those that torchrun has started; raises InputError for unusable options."""
        with started(self.measuring.device) as mine:
            _train(self, mine)


def run_options(arguments: Sequence[str]) -> RunOptions:
    """The published settings of the stream and the learner that the subcommand's arguments name.

    Raises InputError where there is no such stream or learner, the learner is not for the stream, or an option is given
    that only others have.
    """
    main, others = read(Kinds, arguments, add_help=False)
    hyper = hyper_parameters(main.stream, main.learner, {})
    stream, learner = STREAM_CONFIGS[main.stream](), LEARNERS[main.learner].Config(**hyper)
    mine = stream.names() + learner.names()
    all_configs = {"stream": STREAM_CONFIGS.values(), "learner": [other.Config for other in LEARNERS.values()]}
    for argument in others:
        name = argument.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        for group, configs in all_configs.items():
            if argument.startswith("--") and name not in mine and any(name in config.names() for config in configs):
                raise InputError(f"{flag(name)} is not an option of the {group} {getattr(main, group)}")
    # tyro takes the options of each group from the class of its default.
    return RunOptions(main=main, stream=stream, learner=learner)


def _train(options: RunOptions, mine: Processes) -> None:
    """Checks everything first, then works: nobody should wait for an error."""
    measuring, resuming = options.measuring, options.resuming
    out, checkpoint = measuring.out, resuming.checkpoint
    if mine.size > 1 and checkpoint is not None:
        raise InputError(f"--checkpoint is for a run in one process, got {mine.size} processes of torchrun")
    for option in ("resume", "checkpoint_every"):
        if getattr(resuming, option) and checkpoint is None:
            raise InputError(f"{flag(option)} needs --checkpoint DIR, got none")
    check_device(measuring.device)
    with extra("the progress bar"):
        from gem_fast.paper.reports.progress import progress
    if out is not None:
        with extra("--out"):
            from gem_fast.paper.reports import run_plots
    if mine.rank == 0 and measuring.download:
        download(options.stream.data, root=options.stream.data_root)
    if mine.size > 1:
        dist.barrier()
    config = asdict(options.main) | asdict(options.stream) | asdict(options.learner)
    run = TrainingRun(config | {"device": measuring.device, "eval_every": measuring.eval_every})
    if mine.rank > 0:
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
        with progress(run.schedule, so_far) as show, checkpointer or nullcontext():
            watch = [show] if checkpointer is None else [show, checkpointer.after_batch]
            record = run.run(*watch, record=so_far)
    except KeyboardInterrupt as interrupt:
        if checkpointer is not None and checkpointer.saved is not None:
            saved = f"the run is saved in {checkpoint} up to mini-batch {checkpointer.saved}"
            interrupt.args = (f"{saved}; the same command with --resume goes on from there",)
        raise
    try:
        print(f"\n{summary(record)}", flush=True)
    finally:  # what was computed is kept, whatever became of the terminal
        if out is not None:
            files = run_plots.draw_all(record, describe(run.config))
            # It comes last: where it is, the run is complete.
            files["result.json"] = to_json(result_of(record, run.config))
            write_files(out, files)
            print(f"written: {', '.join(str(out / name) for name in files)}")
