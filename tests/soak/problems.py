"""The problems of the solver's soak: each one is drawn from (seed, number) alone, so that it can be looked at again."""

from typing import NamedTuple

import numpy as np
from utils.samplers import SAMPLERS, Array, sample

# P resolves the violation of gradients that nearly oppose each other only to the square root of float64's precision: a
# sine of 1e-8 between g and -g is a pivot of 1e-16 in P. They are counted apart, with a bound of their own.
APART = "nearly_conflicting"
FAMILIES = tuple(kind for kind in SAMPLERS if kind != APART)


class Problem(NamedTuple):
    """A projection: G (t, p), g (p,), and the bound on every multiplier."""

    kind: str
    G: Array
    g: Array
    margin: float


def problem(seed: int, number: int, kinds: tuple[str, ...]) -> Problem:
    """Draws problem `number`: t from 1 to 128, p below, at and above t, norms from 1e-12 to 1e12, margins 0 to 1e3."""
    rng = np.random.default_rng([seed, number])
    kind = kinds[number % len(kinds)]
    t = int(rng.integers(1, 129))
    p = int(rng.choice([1, 2, rng.integers(1, t + 1), t, rng.integers(t, 2 * t + 1), 256]))
    margin = float(rng.choice([0.0, 0.5, 10.0 ** rng.uniform(-3, 3), 1e3]))
    G, g = sample(rng, kind, t, p, float(rng.choice([0.0, 3.0, 12.0])))
    return Problem(kind, G, g, margin)
