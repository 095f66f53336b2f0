"""The subcommand grid: a search over hyper-parameters, as in Appendix A of the paper."""

import itertools
from typing import Any, ClassVar

from gem_fast.paper.config import Rate, Real, Whole
from gem_fast.paper.errors import InputError, flag
from gem_fast.paper.experiments.runner import Experiment, TableOptions, run_experiments, write_table
from gem_fast.paper.experiments.training_run import configuration
from gem_fast.paper.learners import PRESETS, LearnerName
from gem_fast.paper.streams import StreamName
from gem_fast.paper.streams.config import DataOptions

# The values that are tried where none are given, those of the published runs among them. A hyper-parameter that is not
# here keeps its published value.
GRID: dict[str, tuple[float, ...]] = {
    "lr": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "margin": tuple(tenths / 10 for tenths in range(11)),
    "strength": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
}
QUICK_GRID: dict[str, tuple[float, ...]] = {"lr": (0.01, 0.1), "margin": (0.0, 0.5), "strength": (1.0, 100.0)}
QUICK_SIZE = {"tasks": 4, "samples_per_task": 100}
SEARCHED = ("lr", "memory_per_task", "memory", "margin", "strength")


class Grid(DataOptions, TableOptions):
    """What is tried, and on what."""

    DESCRIPTION: ClassVar[str] = (
        "Tries all combinations of hyper-parameters of each learner (Appendix A of the paper), prints them sorted by "
        "ACC, and writes grid-STREAM-LEARNER.json and .md. An interrupted command goes on where it was, and one with "
        "more values computes only what is new."
    )
    default_seeds: ClassVar[tuple[int, ...]] = (0,)

    stream: StreamName = "rotations"
    """kind of tasks"""
    learner: tuple[LearnerName, ...] = ("gem",)
    """one or more methods"""
    lr: tuple[Rate, ...] = ()
    """learning rates of SGD; none: seven from 0.001 to 1"""
    memory_per_task: tuple[Whole, ...] = ()
    """examples of each task kept; none: the published one"""
    memory: tuple[Whole, ...] = ()
    """exemplars of all classes together, for icarl; none: the published one"""
    margin: tuple[Real, ...] = ()
    """lower bounds of the dual variables; none: 0, 0.1, ..., 1"""
    strength: tuple[Real, ...] = ()
    """weights of ewc's penalty or of icarl's distillation; none: seven from 1 to 1000"""

    def run(self) -> None:
        """Searches, prints and writes; raises InputError for unusable options."""
        experiments = {learner: self._experiments(learner) for learner in dict.fromkeys(self.learner)}
        self.prepare(self.data)
        for learner, combinations in experiments.items():
            rows = run_experiments(combinations, self)
            rows.sort(key=lambda row: row.ours["acc"].mean if row.ours else -1.0, reverse=True)
            title = f"Grid search: {learner} on {self.stream} of {self.data_name}, best ACC first"
            write_table(f"grid-{self.stream}-{learner}", title, (), rows, combinations, self)

    def _experiments(self, learner: str) -> list[Experiment]:
        preset = PRESETS.get((self.stream, learner), {})
        given = {name: getattr(self, name) for name in SEARCHED if getattr(self, name)}
        for name in given:
            if not any(name in PRESETS.get((self.stream, other), {}) for other in self.learner):
                raise InputError(f"{flag(name)} is not an option of {', '.join(self.learner)}")
        default = QUICK_GRID if self.quick else GRID
        values = {name: given.get(name) or default.get(name) or (preset[name],) for name in SEARCHED if name in preset}
        common: dict[str, Any] = {"data": self.data, "data_root": self.data_root, "device": self.device}
        common |= QUICK_SIZE if self.quick else {}
        points = [dict(zip(values, numbers, strict=True)) for numbers in itertools.product(*values.values())]
        return [Experiment(point, configuration(self.stream, learner, **common, **point)) for point in points]
