"""From arguments to options: tyro makes the command line of the options' classes."""

import contextlib
import functools
import io
import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from gem_fast.paper.config import shortened
from gem_fast.paper.errors import PROGRAM, InputError

REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A number, or several, refused with a sentence that says what was expected; bounds are the options' own affair."""
    several = info.type_origin is tuple
    kind: Any = get_args(info.type)[0] if several else info.type
    kind = getattr(kind, "__origin__", kind)  # of Annotated
    if kind not in (int, float):
        return None
    expected, form = ("a whole number", "d") if kind is int else ("a number", "g")

    def number(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"must be {expected}, got {shortened(text)!r}") from None

    return PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar=kind.__name__.upper() + " ..." * several,
        instance_from_str=lambda texts: tuple(map(number, texts)) if several else number(texts[0]),
        is_instance=lambda value: isinstance(value, tuple if several else kind),
        str_from_instance=lambda value: [f"{each:{form}}" for each in (value if several else [value])],
    )


def parse(commands: Mapping[str, tuple[Any, str]], arguments: Sequence[str]) -> Any:
    """Reads a command and its options: an object of the class that, with what it does, is given for each command.

    An object in the place of a class has the command's defaults. Raises InputError where the arguments are not those of
    a command, and SystemExit, with code 0, after --help.
    """
    kinds = []
    for name, (options, text) in commands.items():
        kind, default = (options, tyro.MISSING_NONPROP) if isinstance(options, type) else (type(options), options)
        subcommand = tyro.conf.subcommand(name, default=default, description=text, prefix_name=False)
        kinds.append(Annotated[kind, subcommand])
    options, others = read(functools.reduce(operator.or_, kinds), arguments)
    if others:
        raise InputError(f"unrecognized arguments: {shortened(' '.join(others))} (see {PROGRAM} COMMAND --help)")
    return options


def read(kind: Any, arguments: Sequence[str], add_help: bool = True) -> tuple[Any, list[str]]:
    """Reads the options of a class, and returns them and all other arguments; errors as for `parse`."""
    printed = io.StringIO()
    config = (tyro.conf.OmitArgPrefixes,)
    try:
        with REGISTRY, contextlib.redirect_stderr(printed):
            return tyro.cli(
                kind, args=list(arguments), prog=PROGRAM, config=config, return_unknown_args=True, add_help=add_help
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_sentence(printed.getvalue())) from None


def _sentence(box: str) -> str:
    """The first paragraph below the title of the box that tyro prints for an error."""
    # A line of dashes ends a paragraph; the sign of a number that begins a line stays.
    lines = [re.sub("^[─-]+$", "", line.strip(" │╰╯")) for line in box.splitlines()[1:]]
    text = " ".join(itertools.takewhile(bool, itertools.dropwhile(operator.not_, lines)))
    # "Error parsing --lr: must be ..." is ours from there on; of a whole class, so is all that follows.
    text = re.sub(r"^Error parsing (--\S+): ", r"\1 ", text)
    return f"{re.sub(r'^Error parsing [^:]*: ', '', text)} (see {PROGRAM} COMMAND --help)"
