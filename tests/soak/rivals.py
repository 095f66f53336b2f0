"""Other solvers on the same problems: where they succeed they are compared with ours, where they fail it is counted."""

from collections.abc import Callable
from dataclasses import dataclass, field

import daqp
import numpy as np
import quadprog
from utils.asserts import kkt_violation
from utils.samplers import Array

# Iterations after which DAQP is stopped: its own default.
DAQP_ITERATIONS = 1000


def solve_with_quadprog(P: Array, q: Array, lower: float) -> Array | None:
    """The solution, or None where quadprog says "matrix G is not positive definite"."""
    try:
        solution: Array = quadprog.solve_qp(P, -q, np.eye(len(q)), np.full(len(q), lower))[0]
    except ValueError:
        return None
    return solution


def solve_with_daqp(P: Array, q: Array, lower: float) -> Array | None:
    """The solution, or None where DAQP's exit flag says that there is none."""
    t = len(q)
    solution, _, flag, _ = daqp.solve(
        P, q, np.zeros((0, t)), np.full(t, 1e30), np.full(t, lower), np.zeros(t, np.int32), iter_limit=DAQP_ITERATIONS
    )
    return solution if flag == 1 else None


RIVALS: dict[str, Callable[[Array, Array, float], Array | None]] = {
    "quadprog": solve_with_quadprog,
    "DAQP": solve_with_daqp,
}


@dataclass
class Comparison:
    """How one rival fared, and how far our answers are from its sound ones, relative to the problem's scale."""

    problems: int = 0
    refused: int = 0
    wrong: int = 0
    sound: int = 0
    worst_excess_of_our_objective: float = 0.0
    worst_difference_of_projected_gradient: float = 0.0
    worst_violation_called_success: float = 0.0

    def add(self, theirs: Array | None, ours: Array, G: Array, P: Array, q: Array, lower: float, bound: float) -> None:
        """Counts one answer; None is a refusal."""
        self.problems += 1
        if theirs is None:
            self.refused += 1
            return
        violation = kkt_violation(P, q, theirs, lower) if np.isfinite(theirs).all() else np.inf
        if not violation <= bound:
            self.wrong += 1
            self.worst_violation_called_success = max(self.worst_violation_called_success, violation)
            return
        self.sound += 1
        length = np.sqrt(np.diag(P))
        some = length > 0
        if not some.any():
            return
        unit = length[some]
        R, c = P[np.ix_(some, some)] / np.outer(unit, unit), q[some] / unit
        x, y = ours[some] * unit, theirs[some] * unit
        scale = max(np.abs(c).max(), np.abs(x).max(), np.abs(y).max()) or 1.0
        x, y, c = x / scale, y / scale, c / scale
        excess = 0.5 * x @ R @ x + c @ x - 0.5 * y @ R @ y - c @ y
        apart = float(np.linalg.norm((G[some] / unit[:, None]).T @ (x - y)))
        self.worst_excess_of_our_objective = max(self.worst_excess_of_our_objective, float(excess))
        self.worst_difference_of_projected_gradient = max(self.worst_difference_of_projected_gradient, apart)


@dataclass
class Rivals:
    """All rivals, each compared on the same problems."""

    comparisons: dict[str, Comparison] = field(default_factory=lambda: {name: Comparison() for name in RIVALS})

    def compare(self, ours: Array, G: Array, P: Array, q: Array, lower: float, bound: float) -> None:
        """Solves with each of them and counts."""
        for name, solve in RIVALS.items():
            self.comparisons[name].add(solve(P, q, lower), ours, G, P, q, lower, bound)
