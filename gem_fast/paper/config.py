"""Typed options: a frozen dataclass has the name, the type, the bounds, the default and the help of each option, once.

The command line is made of these classes, and a configuration made in Python is checked by the same bounds.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typing_extensions import dataclass_transform

from gem_fast.paper.errors import InputError, flag


@dataclass(frozen=True)
class Bounds:
    """Both ends of what an option may be, included; `above` leaves the lower one out."""

    minimum: int
    maximum: float  # an int for a whole number
    above: bool = False

    def check(self, name: str, value: float) -> None:
        """Raises InputError, with the option's name, for a value outside."""
        if not (self.minimum < value if self.above else self.minimum <= value) or not value <= self.maximum:
            kind = "a whole number" if isinstance(self.maximum, int) else "a number"
            least = f"above {self.minimum} and at most" if self.above else f"from {self.minimum} to"
            raise InputError(f"{flag(name)} must be {kind} {least} {self.maximum}, got {shortened(str(value))}")


# The largest numbers that torch and the compiled code can compute with, and some more than anybody needs.
Whole = Annotated[int, Bounds(1, 2**31 - 1)]
Seed = Annotated[int, Bounds(0, 2**63 - 1)]
Real = Annotated[float, Bounds(0, 1e30)]
Rate = Annotated[float, Bounds(0, 1e30, above=True)]


def by_stream(**defaults: Any) -> Any:
    """A field whose default depends on the stream; there is none on a stream that is not named."""
    return field(metadata={"by_stream": defaults})


@dataclass_transform(kw_only_default=True, frozen_default=True)
@dataclass(frozen=True, kw_only=True)
class Options:
    """The base of all options; its subclasses become dataclasses by themselves, frozen and with keywords only.

    Raises InputError where a value is out of its bounds.
    """

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(self.__class__, include_extras=True).items():
            if (bounds := _bounds_in(hint)) is not None:
                values = getattr(self, name)
                for value in values if isinstance(values, tuple) else (values,):
                    if value is not None:
                        bounds.check(name, value)

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


def _bounds_in(hint: Any) -> Bounds | None:
    """The first bounds within a type: of `Whole | None`, of `tuple[Real, ...]`."""
    if get_origin(hint) is Annotated and isinstance(hint.__metadata__[0], Bounds):
        return hint.__metadata__[0]
    return next(filter(None, map(_bounds_in, get_args(hint))), None)


def shortened(text: str) -> str:
    """A text that fits into a sentence."""
    return text if len(text) <= 50 else f"{text[:47]}..."
