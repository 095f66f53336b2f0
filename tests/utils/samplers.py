"""Hard problems for the projection, shared by the tests and the benchmarks: every kind at every scale."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Sampler = Callable[[np.random.Generator, int, int], Array]


def gaussian(rng: np.random.Generator, t: int, p: int) -> Array:
    """Independent rows (dependent when t > p)."""
    return rng.standard_normal((t, p))


def correlated(rng: np.random.Generator, t: int, p: int) -> Array:
    """Rows that share most of their direction, as the gradients of similar tasks do."""
    return rng.standard_normal(p) + 0.3 * rng.standard_normal((t, p))


def duplicates(rng: np.random.Generator, t: int, p: int) -> Array:
    """Every row is an exact copy of one of a few."""
    distinct = rng.standard_normal((max(1, t // 3), p))
    return distinct[rng.integers(len(distinct), size=t)]


def zero_rows(rng: np.random.Generator, t: int, p: int) -> Array:
    """Some rows, perhaps all, are zero."""
    return rng.standard_normal((t, p)) * (rng.random((t, 1)) < 0.6)


def rank_deficient(rng: np.random.Generator, t: int, p: int) -> Array:
    """t rows in a space of fewer dimensions."""
    rank = max(1, min(t, p) // 2)
    return rng.standard_normal((t, rank)) @ rng.standard_normal((rank, p))


def nearly_parallel(rng: np.random.Generator, t: int, p: int) -> Array:
    """Rows that differ from one direction by 1e-9 to 1e-3 of their length."""
    return rng.standard_normal(p) + 10.0 ** rng.uniform(-9, -3, (t, 1)) * rng.standard_normal((t, p))


def conflicting(rng: np.random.Generator, t: int, p: int) -> Array:
    """Pairs g and -g: only gradients orthogonal to both satisfy them."""
    half = rng.standard_normal(((t + 1) // 2, p))
    return np.concatenate([half, -half])[:t][rng.permutation(t)]


def nearly_conflicting(rng: np.random.Generator, t: int, p: int) -> Array:
    """Pairs that miss being opposite by 1e-12 to 1e-2 of their length: the dual solution is large."""
    G = conflicting(rng, t, p)
    return G + 10.0 ** rng.uniform(-12, -2, (t, 1)) * rng.standard_normal((t, p))


def stationary(rng: np.random.Generator, t: int, p: int) -> Array:
    """Rows whose convex hull holds zero: no direction serves all tasks."""
    G = rng.standard_normal((t, p))
    weights = rng.random(t) + 0.1
    G[-1] = -(weights[:-1] @ G[:-1]) / weights[-1] if t > 1 else 0.0
    return G


SAMPLERS: dict[str, Sampler] = {
    sampler.__name__: sampler
    for sampler in (
        gaussian,
        correlated,
        duplicates,
        zero_rows,
        rank_deficient,
        nearly_parallel,
        conflicting,
        nearly_conflicting,
        stationary,
    )
}


def sample(rng: np.random.Generator, kind: str, t: int, p: int, spread: float = 0.0) -> tuple[Array, Array]:
    """Draws G (t, p) and g (p,), float64.

    Args:
        rng: source of randomness.
        kind: key of `SAMPLERS`.
        t: number of past tasks.
        p: number of parameters.
        spread: rows are scaled by 10 ** uniform(-spread, spread); 12 mixes norms from 1e-12 to 1e12.
    """
    G = SAMPLERS[kind](rng, t, p)
    if spread:
        G = G * 10.0 ** rng.uniform(-spread, spread, (t, 1))
    # Against the rows as often as with them, so that constraints are violated.
    g = rng.standard_normal(p) - rng.choice([0.0, 0.3, 3.0]) * G.sum(0) / max(float(np.abs(G).max(initial=0.0)), 1e-300)
    return G, g
