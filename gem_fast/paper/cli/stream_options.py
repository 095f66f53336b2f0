"""The options of the command line for the stream of tasks: which one, and in which order and pieces it is learned."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from gem_fast.paper.cli.numbers import whole
from gem_fast.paper.data import MNIST_5K, NAMES, ImageData, default_root, download, load_data
from gem_fast.paper.errors import InputError, flag
from gem_fast.paper.streams import STREAMS, Stream

__all__ = [
    "add_data_options",
    "add_root_options",
    "add_stream_options",
    "download_data",
    "load_data_of",
    "make_stream",
    "stream_config",
]

# The options of each stream, and their defaults. None stands for all examples of a task.
DEFAULTS: dict[str, dict[str, Any]] = {
    "rotations": {"data": MNIST_5K, "tasks": 20, "samples_per_task": 1000},
    "permutations": {"data": MNIST_5K, "tasks": 20, "samples_per_task": 1000},
    "cifar100": {"data": "cifar100", "tasks": 20, "samples_per_task": None, "class_order": "natural"},
    "split": {"data": MNIST_5K, "tasks": 5, "samples_per_task": None, "class_order": "natural", "head": "task"},
}
# Options of all streams.
COMMON = ("stream", "data_root", "batch_size", "epochs", "rounds", "shuffle_tasks", "seed")


def add_stream_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a command.

    Args:
        parser: The command's parser.
    """
    group = parser.add_argument_group("the stream of tasks")
    group.add_argument(
        "--stream", choices=list(STREAMS), default="rotations", help="kind of tasks (default: %(default)s)"
    )
    add_data_options(group, None, _defaults("data"))
    group.add_argument("--tasks", type=whole(1), metavar="T", help=f"number of tasks (default: {_defaults('tasks')})")
    group.add_argument(
        "--samples-per-task",
        type=whole(1),
        metavar="N",
        help=f"training examples of each task (default: {_defaults('samples_per_task')})",
    )
    group.add_argument(
        "--class-order",
        choices=("natural", "random"),
        help="whether classes are given to the tasks in the order of their numbers or in a random order "
        f"(default: {_defaults('class_order')})",
    )
    group.add_argument(
        "--head",
        choices=("task", "shared"),
        help="task: each task is answered with a slice of the outputs of its own; shared: with all outputs, without "
        f"the task's number (default: {_defaults('head')})",
    )
    group.add_argument(
        "--batch-size", type=whole(1), default=10, metavar="N", help="examples per mini-batch (default: %(default)s)"
    )
    group.add_argument(
        "--epochs",
        type=whole(1),
        default=1,
        metavar="N",
        help="passes over a task's examples before the next task begins (default: %(default)s)",
    )
    group.add_argument(
        "--rounds",
        type=whole(1),
        default=1,
        metavar="N",
        help="how often all tasks come, one after another; each time with another part of their examples "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--shuffle-tasks", action="store_true", help="learn the tasks in a random order (default: in their own order)"
    )
    group.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of the stream, of the order of the examples and of the initial weights (default: %(default)s)",
    )


def add_data_options(group: argparse._ActionsContainer, default: str | None, shown: str) -> None:
    """Adds --data, --data-root and --download.

    Args:
        group: Where to add them.
        default: That of --data.
        shown: What --help says it is.
    """
    group.add_argument(
        "--data",
        default=default,
        metavar="DATA",
        help=f"{MNIST_5K}, 5000 real MNIST digits; {', '.join(NAMES[1:])}, as torchvision stores them; a folder with "
        "the four IDX files of MNIST, Fashion-MNIST, KMNIST or EMNIST; CIFAR-100 in its binary or Python format, as a "
        f"folder or .tar.gz (default: {shown})",
    )
    add_root_options(group)


def add_root_options(group: argparse._ActionsContainer) -> None:
    """Adds --data-root and --download; for the arguments as for `add_data_options`."""
    group.add_argument(
        "--data-root",
        metavar="DIR",
        help=f"torchvision's folder of data sets (default: {str(default_root()).replace('%', '%%')})",
    )
    group.add_argument(
        "--download",
        action="store_true",
        help="let torchvision download the data set into --data-root, unless it is there (default: no)",
    )


def load_data_of(config: dict[str, Any]) -> ImageData:
    """The data set that a configuration names."""
    return load_data(config["data"], None if config["data_root"] is None else Path(config["data_root"]))


def download_data(args: argparse.Namespace, *names: str) -> None:
    """Downloads data sets if --download is given; raises InputError where that fails."""
    if args.download:
        for name in [name for name in names if name in NAMES and name != MNIST_5K] or names:
            download(name, None if args.data_root is None else Path(args.data_root))


def stream_config(args: argparse.Namespace) -> dict[str, Any]:
    """Every option of the stream by name, with its default where it was not given.

    Args:
        args: The parsed options.

    Raises:
        InputError: An option is not one of this stream.
    """
    defaults = DEFAULTS[args.stream]
    config = {name: getattr(args, name) for name in COMMON}
    for name in ("data", "tasks", "samples_per_task", "class_order", "head"):
        given = getattr(args, name)
        if name in defaults:
            config[name] = defaults[name] if given is None else given
        elif given is not None:
            raise InputError(f"{flag(name)} is not an option of the stream {args.stream}")
    return config


def make_stream(config: dict[str, Any], data: ImageData, generator: torch.Generator) -> Stream:
    """Makes the stream.

    Args:
        config: As stream_config returned it.
        data: The data set that it names.
        generator: A CPU generator, source of all that is random about the tasks.

    Returns:
        The stream, on the CPU.

    Raises:
        InputError: The data are not for this stream, or a number is too large for them.
    """
    options = {name: config[name] for name in ("class_order", "head") if name in config}
    stream = STREAMS[config["stream"]](data, config["tasks"], config["samples_per_task"], generator, **options)
    if config["shuffle_tasks"]:
        stream = stream.in_order(torch.randperm(stream.n_tasks, generator=generator).tolist())
    return stream


def _defaults(name: str) -> str:
    """The defaults of an option, for --help."""
    streams: dict[str, list[str]] = {}
    for stream, defaults in DEFAULTS.items():
        if name in defaults:
            value = "all" if defaults[name] is None else str(defaults[name])
            streams.setdefault(value, []).append(stream)
    if len(streams) == 1 and len(DEFAULTS) == len(next(iter(streams.values()))):
        return next(iter(streams))
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in streams.items())
