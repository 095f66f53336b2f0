"""The learners' hyper-parameters as options of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from gem_fast import MEMORY_POLICIES
from gem_fast.paper.cli.numbers import real, whole
from gem_fast.paper.errors import flag
from gem_fast.paper.experiments.presets import PRESETS
from gem_fast.paper.learners import LEARNERS

__all__ = ["OPTIONS", "add_learner_options", "learner_options"]


def _policy(text: str) -> str:
    if text not in MEMORY_POLICIES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(MEMORY_POLICIES)}, got {text!r}")
    return text


# hyper-parameter -> how it is read (None: a switch, with its --no- form), what it is called in --help, what it does
OPTIONS: dict[str, tuple[Callable[[str], Any] | None, str | None, str]] = {
    "lr": (real(above_zero=True), "LR", "learning rate of SGD"),
    "memory_per_task": (
        whole(1),
        "M",
        "examples of each task kept in the episodic memory; for ewc the first ones of a task, which the Fisher "
        "information is computed from",
    ),
    "memory": (whole(1), "K", "exemplars of all classes together"),
    "memory_policy": (_policy, "P", f"which examples of each task gem keeps: {', '.join(MEMORY_POLICIES)}"),
    "memory_batch": (
        whole(1),
        "N",
        "examples drawn anew for each step: for gem of each past task, for agem of all past tasks together",
    ),
    "refresh_every": (whole(1), "R", "steps in which each past task's gradient is computed once, in turns"),
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
        group.add_argument(flag(name), help=f"{text} (default: {_defaults(name)})", **kind)


def learner_options(args: argparse.Namespace) -> dict[str, Any]:
    """The hyper-parameters by name, None for one that was not given."""
    return {name: getattr(args, name) for name in OPTIONS}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "all" if value is None else value if isinstance(value, str) else f"{value:g}"


def _defaults(name: str) -> str:
    """The published values of a hyper-parameter, for --help."""
    values = {key: preset[name] for key, preset in PRESETS.items() if name in preset}
    texts = []
    for learner in LEARNERS:
        streams: dict[str, list[str]] = {}
        for (stream, owner), value in values.items():
            if owner == learner:
                streams.setdefault(_text(value), []).append(stream)
        if len(streams) == 1:
            texts.append(f"{learner} {next(iter(streams))}")
        elif streams:
            texts.append(f"{learner} " + " / ".join(f"{text} on {', '.join(on)}" for text, on in streams.items()))
    return "; ".join(texts)
