"""The learners' hyper-parameters as options of the command line, and the values that options take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from gem_fast.paper.errors import InputError
from gem_fast.paper.learners import LEARNERS
from gem_fast.paper.presets import PRESETS

__all__ = ["add_learner_options", "hyper_parameters", "real", "whole"]


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Reads a whole number in a range, both ends included."""
    span = f"of at least {least}" if most is None else f"between {least} and {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be a whole number {span}, got {text!r}")
        return value

    return parse


def real(above_zero: bool) -> Callable[[str], float]:
    """Reads a finite number, above zero or not below it."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > 0 if above_zero else value >= 0)):
            least = "above 0" if above_zero else "of at least 0"
            raise argparse.ArgumentTypeError(f"must be a finite number {least}, got {text!r}")
        return value

    return parse


# hyper-parameter -> how it is read (None: a switch, with its --no- form), what it is called in --help, what it does
OPTIONS: dict[str, tuple[Callable[[str], float] | None, str | None, str]] = {
    "lr": (real(above_zero=True), "LR", "learning rate of SGD"),
    "memory_per_task": (
        whole(1),
        "M",
        "examples of each task kept in the episodic memory; for ewc the first ones of a task, which the Fisher "
        "information is computed from",
    ),
    "memory": (whole(1), "K", "exemplars of all classes together"),
    "memory_batch": (whole(1), "N", "examples of past tasks drawn for each step"),
    "margin": (
        real(above_zero=False),
        "GAMMA",
        "lower bound of the dual variables v, 0 or more; larger favours backward transfer",
    ),
    "ridge": (real(above_zero=False), "EPS", "added to the diagonal of the Gramian, 0 or more; 0 is exact"),
    "strength": (real(above_zero=False), "S", "weight of ewc's penalty or of icarl's distillation, 0 or more"),
    "consolidated": (None, None, "whether ewc keeps one penalty for all past tasks together, of the same gradient"),
    "per_example": (
        None,
        None,
        "whether ewc's Fisher information is the mean of squared gradients of single examples; it is the square of "
        "their mean gradient in the published runs",
    ),
    "clone": (None, None, "whether a new task's network starts as a clone of the last one, or at random"),
}


def add_learner_options(group: argparse._ArgumentGroup) -> None:
    """Adds --learner and all hyper-parameters; one that is not given is None.

    Args:
        group: Where to add them.
    """
    group.add_argument("--learner", choices=LEARNERS, default="gem", help="method (default: %(default)s)")
    for name, (parse, metavar, text) in OPTIONS.items():
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if parse is not None:
            kind = {"type": parse, "metavar": metavar}
        group.add_argument(_flag(name), help=f"{text} (default: {_defaults(name)})", **kind)


def hyper_parameters(args: argparse.Namespace) -> dict[str, float]:
    """The published hyper-parameters of the learner on the stream, overruled by the options given.

    Args:
        args: With `stream`, `learner` and all hyper-parameters.

    Returns:
        What the learner's constructor takes, by name.

    Raises:
        InputError: The learner cannot be run on the stream, or a hyper-parameter given is none of its own.
    """
    preset = PRESETS.get((args.stream, args.learner))
    if preset is None:
        raise InputError(f"--learner {args.learner} is not for the stream {args.stream}, whose network it cannot train")
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    for name in given:
        if name not in preset:
            raise InputError(f"{_flag(name)} is not an option of the learner {args.learner}")
    return preset | given


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _defaults(name: str) -> str:
    """The published values of a hyper-parameter, for --help."""
    values = {key: preset[name] for key, preset in PRESETS.items() if name in preset}
    texts = []
    for learner in LEARNERS:
        streams: dict[str, list[str]] = {}
        for (stream, owner), value in values.items():
            if owner == learner:
                text = ("no", "yes")[value] if isinstance(value, bool) else f"{value:g}"
                streams.setdefault(text, []).append(stream)
        if len(streams) == 1:
            texts.append(f"{learner} {next(iter(streams))}")
        elif streams:
            texts.append(f"{learner} " + " / ".join(f"{text} on {', '.join(on)}" for text, on in streams.items()))
    return "; ".join(texts)
