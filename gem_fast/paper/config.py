"""Typed options: a frozen dataclass has the name, the type, the bounds, the default and the help of each option, once.

The command line is made of these classes, and a configuration made in Python is checked by the same bounds.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from gem_fast.paper.errors import InputError, flag


@dataclass(frozen=True)
class Bounds:
    """Both ends of what an option may be, included; `above` leaves the lower one out."""

    minimum: int
    maximum: float
    above: bool = False

    def check(self, name: str, value: float, whole: bool) -> None:
        """Raises InputError, with the option's name, for a value outside."""
        if whole:
            low, kind, least = not value >= self.minimum, "a whole number ", f"of at least {self.minimum}"
        else:
            low = not (math.isfinite(value) and (value > self.minimum if self.above else value >= self.minimum))
            kind, least = "a finite number ", f"{'above' if self.above else 'of at least'} {self.minimum}"
        if low:
            raise InputError(f"{flag(name)} must be {kind}{least}, got {value}")
        if value > self.maximum:
            most = f"a whole number of at most {self.maximum}" if whole else f"at most {self.maximum:g}"
            raise InputError(f"{flag(name)} must be {most}, got {shortened(str(value))}")


# The largest numbers that torch and the compiled code can compute with, and some more than anybody needs.
Whole = Annotated[int, Bounds(1, 2**31 - 1)]
Seed = Annotated[int, Bounds(0, 2**63 - 1)]
Real = Annotated[float, Bounds(0, 1e30)]
Rate = Annotated[float, Bounds(0, 1e30, above=True)]


def by_stream(**defaults: Any) -> Any:
    """A field whose default depends on the stream; there is none on a stream that is not named."""
    return field(metadata={"by_stream": defaults})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The base of all options.

    Raises:
        InputError: A value is out of its bounds.
    """

    def __post_init__(self) -> None:
        for name, (bounds, whole) in _bounds_of(self.__class__).items():
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value is not None:
                    bounds.check(name, value, whole)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all options."""
        return tuple(each.name for each in fields(cls))

    @classmethod
    def defaults(cls, stream: str) -> dict[str, Any] | None:
        """All options by name as they are by default on a stream; None where one has no default there."""
        given = {each.name: each.metadata["by_stream"] for each in fields(cls) if "by_stream" in each.metadata}
        if any(stream not in values for values in given.values()):
            return None
        return asdict(cls(**{name: values[stream] for name, values in given.items()}))


def _bounds_of(options: Any) -> dict[str, tuple[Bounds, bool]]:
    """For each bounded option its bounds, and whether it is a whole number."""
    found = {name: _find(hint) for name, hint in get_type_hints(options, include_extras=True).items()}
    return {name: each for name, each in found.items() if each is not None}


def _find(hint: Any) -> tuple[Bounds, bool] | None:
    """The first bounds within a type: of `Whole | None`, of `tuple[Real, ...]`."""
    if get_origin(hint) is Annotated and isinstance(hint.__metadata__[0], Bounds):
        return hint.__metadata__[0], hint.__origin__ is int
    return next((found for part in get_args(hint) if (found := _find(part)) is not None), None)


def shortened(text: str) -> str:
    """A text that fits into a sentence."""
    return text if len(text) <= 50 else f"{text[:47]}..."
