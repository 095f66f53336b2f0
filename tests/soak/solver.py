"""A million random and hard problems: every answer must meet the KKT conditions.

    cd tests && python -m soak.solver --seed 0 --problems 1000000

The result goes to bench/results/soak_solver.json; the exit status is 1 when an answer failed.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass, field

import numpy as np
from soak.problems import APART, FAMILIES, problem
from soak.record import write_result
from soak.rivals import Rivals
from tqdm import tqdm
from utils.asserts import kkt_violation
from utils.samplers import Array

from gem_fast import Status, solver

# Largest violation of the KKT conditions, relative to the problem's scale.
BOUND = 1e-9
BOUND_APART = 1e-6


def max_iterations(t: int) -> int:
    """The solver's own limit (csrc/core/tolerances.h)."""
    return 100 + 20 * t


@dataclass
class Family:
    """What was seen in one family of problems."""

    problems: int = 0
    violated: int = 0  # problems in which the incoming gradient violates a constraint
    failures: int = 0
    worst_kkt_violation: float = 0.0
    worst_primal_violation: float = 0.0
    worst_reported_residual: float = 0.0
    max_iterations: int = 0
    max_iterations_per_constraint: float = 0.0
    failed_problems: list[int] = field(default_factory=list)


def primal_violation(G: Array, g: Array, v: Array) -> float:
    """The largest violation of g_k . g~ >= 0 for g~ = g + G^T v, formed from G itself and in units of gradient length.

    The scale is the length of what g~ is summed from: the largest of |g| and |v_k| |g_k|.
    """
    length = np.linalg.norm(G, axis=1)
    some = length > 0
    if not some.any():
        return 0.0
    scale = max(float(np.linalg.norm(g)), float((np.abs(v) * length).max()))
    slopes = (G @ (g + G.T @ v))[some] / length[some]
    return float(max(0.0, -slopes.min()) / scale) if scale > 0 else 0.0


def check_one(
    seed: int, number: int, kinds: tuple[str, ...], bound: float, family: Family, rivals: Rivals | None
) -> None:
    """Solves problem `number`, and counts a failure where any condition does not hold to `bound`."""
    _, G, g, margin = problem(seed, number, kinds)
    P, q = G @ G.T, G @ g
    v, status, residual, iterations = solver.nnqp(P, q, margin)
    kkt = kkt_violation(P, q, v, margin)
    primal = primal_violation(G, g, v)
    t = len(q)
    sound = (
        status == Status.SOLVED
        and bool((v >= margin).all())
        and max(kkt, primal, float(residual)) <= bound
        and iterations <= max_iterations(t)
    )
    family.problems += 1
    family.violated += bool((q < 0).any())
    family.worst_kkt_violation = max(family.worst_kkt_violation, kkt)
    family.worst_primal_violation = max(family.worst_primal_violation, primal)
    family.worst_reported_residual = max(family.worst_reported_residual, float(residual))
    family.max_iterations = max(family.max_iterations, int(iterations))
    family.max_iterations_per_constraint = max(family.max_iterations_per_constraint, float(iterations) / t)
    if not sound:
        family.failures += 1
        family.failed_problems = [*family.failed_problems, number][:20]
    if rivals is not None:
        rivals.compare(v, G, P, q, margin, bound)


def soak(seed: int, problems: int, kinds: tuple[str, ...], bound: float, rivals_every: int) -> dict[str, object]:
    """Solves `problems` problems, families in turn, each `rivals_every`-th by the rivals too."""
    families = {kind: Family() for kind in kinds}
    rivals = Rivals()
    start = time.perf_counter()
    for number in tqdm(range(problems), unit=" problems", mininterval=1.0, disable=None):
        # Families come in turn, so the rivals must not see every n-th problem but every n-th round of all families.
        compared = rivals if number // len(kinds) % rivals_every == 0 else None
        check_one(seed, number, kinds, bound, families[kinds[number % len(kinds)]], compared)
    return {
        "problems": problems,
        "failures": sum(family.failures for family in families.values()),
        "bound": bound,
        "seconds": round(time.perf_counter() - start, 1),
        "families": {kind: asdict(family) for kind, family in families.items()},
        "rivals": {"on_every": rivals_every, **{name: asdict(c) for name, c in rivals.comparisons.items()}},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=1_000_000)
    parser.add_argument("--rivals-every", type=int, default=10, help="quadprog and DAQP see one problem in so many")
    options = parser.parse_args()
    required = soak(options.seed, options.problems, FAMILIES, BOUND, options.rivals_every)
    apart = soak(options.seed, options.problems // 10, (APART,), BOUND_APART, options.rivals_every)
    result = {
        "seed": options.seed,
        "failures": required["failures"],
        "iterations_bound": "100 + 20 t",
        "required": required,
        "apart": {
            "why": "P holds the inner products of opposite gradients to 1e-16, so a sine below 1e-8 between them, and "
            "with it a violation of 1e-8 times the multiplier's length, is not in float64's P at all",
            **apart,
        },
    }
    path = write_result("soak_solver", result)
    print(f"{required['failures']} failures in {required['problems']} problems, {apart['failures']} apart: {path}")
    return 1 if required["failures"] or apart["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
