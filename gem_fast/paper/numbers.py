"""Numbers on the command line, for argparse's `type`: parsed, or refused with what was expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

__all__ = ["real", "whole"]


def whole(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers in a range, both ends included."""
    expected = f"of at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or (maximum is not None and value > maximum):
            raise argparse.ArgumentTypeError(f"must be a whole number {expected}, got {text!r}")
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
            expected = "above 0" if above_zero else "of at least 0"
            raise argparse.ArgumentTypeError(f"must be a finite number {expected}, got {text!r}")
        return value

    return parse
