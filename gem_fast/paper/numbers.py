"""Numbers on the command line, for argparse's `type`: parsed, or refused with what was expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

__all__ = ["real", "whole"]


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers in a range, both ends included."""
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
    """A parser of finite numbers, above zero or of at least zero."""

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
