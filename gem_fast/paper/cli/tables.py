"""The subcommands with a result table: those of the paper, beside what it printed, and what goes beyond it."""

from typing import Any, ClassVar, Literal

from gem_fast.paper.config import Whole
from gem_fast.paper.data import MNIST_5K
from gem_fast.paper.errors import extra
from gem_fast.paper.experiments.runner import CACHE, Experiment, TableOptions, run_experiments, write_table
from gem_fast.paper.experiments.training_run import RunConfig, configuration
from gem_fast.paper.reports import published
from gem_fast.paper.reports.published import MEASURES, MEMORIES
from gem_fast.paper.streams.config import DataOptions
from gem_fast.paper.streams.descriptors import DESCRIPTORS

# Less of everything, for a check that all works.
QUICK = {"tasks": 4, "samples_per_task": 200}
QUICK_CIFAR = {"tasks": 4, "samples_per_task": 20}
# The paper's sizes on CIFAR-100.
CIFAR = {"tasks": 20, "samples_per_task": 2500}
# Whom Figure 1 shows: A-GEM has no published settings, and on CIFAR-100 none that were tried.
DIGIT_LEARNERS = ("joint", "single", "independent", "multimodal", "ewc", "agem", "gem")
CIFAR_LEARNERS = ("joint", "single", "independent", "icarl", "ewc", "gem")
PaperStream = Literal["permutations", "rotations", "cifar100"]
# A result table before its experiments are run: title and notes as in ResultTable, an experiment for each row.
Spec = tuple[str, list[Experiment], tuple[str, ...]]

DIVIDED = "BWT and FWT are divided by T - 1, as in the paper's equations; its code divides by T."
ORACLE = 'joint, the paper\'s "single, shuffled data", learns all tasks at once: the oracle.'
DIGITS = "Ours: 5000 MNIST digits, 4000 of them to learn from and 1000 to test; the paper's: all of MNIST."
ZERO_SHOT = "zero-shot: mean accuracy on the tasks not yet seen, after each task of the stream but the last."


class PaperTable(TableOptions):
    """A result table with a picture; the class's docstring is the command's description."""

    name: ClassVar[str]
    cache: ClassVar[str] = CACHE

    def spec(self) -> Spec:
        """What is run."""
        raise NotImplementedError

    def config(self, stream: str, learner: str, **more: Any) -> RunConfig:
        """The configuration of a run, of the paper's size or a quick one, on the data that the options name."""
        given, cifar = vars(self), stream == "cifar100"
        size = (QUICK_CIFAR if cifar else QUICK) if self.quick else CIFAR if cifar else {}
        if cifar and learner == "gem":
            more["memory_batch"] = given["memory_batch"]
        more |= {"data": given["cifar" if cifar else "data"], "data_root": self.data_root, "device": self.device}
        return configuration(stream, learner, **size | more)

    @classmethod
    def description(cls) -> str:
        """For --help."""
        return (
            f"{cls.__doc__} Writes {cls.name}.json, {cls.name}.md and {cls.name}.png. An interrupted command goes on "
            "where it was: finished runs are in OUT/run_cache."
        )

    def run(self) -> None:
        """Runs what is missing, prints the table and writes its files; raises InputError for unusable options."""
        with extra("the picture"):
            from gem_fast.paper.reports.table_plots import draw
        title, experiments, notes = self.spec()
        data = dict.fromkeys(each.config["data"] for each in experiments)
        self.prepare(*data)
        rows = run_experiments(experiments, self, self.cache)
        write_table(self.name, title, notes + (DIGITS,) * (MNIST_5K in data), rows, experiments, self, draw)


class CifarTable(PaperTable):
    """What runs on CIFAR-100."""

    cifar: str = "cifar100"
    """CIFAR-100: cifar100, as torchvision stores it, or a folder or .tar.gz"""
    memory_batch: Whole | None = None
    """examples that gem draws of each past task for a step on cifar100; None: all, as published"""


class Table1(DataOptions, PaperTable):
    """Reproduces, beside the paper's numbers, Table 1, the training time of all learners."""

    name = "table1"
    # It compares times, which must be measured side by side: it does not take runs of other tables.
    cache = f"{CACHE}/table1"

    def spec(self) -> Spec:
        """Each learner that the paper has times of, and two more, on both streams."""
        experiments = []
        for stream in ("permutations", "rotations"):
            for learner in ("single", "independent", "multimodal", "ewc", "gem", "gem_pure_python", "agem"):
                paper = published.PAPER_TABLE1.get((stream, learner), {})
                condition = {"stream": stream, "learner": learner}
                experiments.append(Experiment(condition, self.config(stream, learner), ("seconds",), paper))
        title = f"Table 1: training time on {self.data_name} in seconds ({self.device})"
        return title, experiments, ("Seconds of training without evaluation.",)


class Table2(CifarTable):
    """Reproduces, beside the paper's numbers, Table 2, ACC on CIFAR-100 by the size of the memory."""

    name = "table2"

    def spec(self) -> Spec:
        """Both learners with a memory of a size, with all sizes."""
        experiments = []
        tasks = self.config("cifar100", "gem")["tasks"]
        for learner in ("gem", "icarl"):
            for memory in MEMORIES:
                size = {"memory_per_task": memory // tasks} if learner == "gem" else {"memory": memory}
                condition, paper = {"learner": learner, "memory": memory}, published.PAPER_TABLE2[learner, memory]
                experiments.append(Experiment(condition, self.config("cifar100", learner, **size), ("acc",), paper))
        return "Table 2: ACC on CIFAR-100 by the examples in memory", experiments, ()


class Table3(DataOptions, PaperTable):
    """Reproduces, beside the paper's numbers, Table 3, ACC and BWT on rotations with 1, 2 and 5 epochs per task."""

    name = "table3"

    def spec(self) -> Spec:
        """All learners of the paper with all numbers of epochs."""
        experiments = []
        for learner in ("joint", "single", "independent", "multimodal", "ewc", "gem"):
            for epochs in (1, 2, 5):
                measures = ("acc",) if learner == "joint" else ("acc", "bwt")
                paper = {name: published.PAPER_TABLE3[learner, epochs][name] for name in measures}
                config = self.config("rotations", learner, epochs=epochs)
                experiments.append(Experiment({"learner": learner, "epochs": epochs}, config, measures, paper))
        title = f"Table 3: ACC and BWT on rotations of {self.data_name} by epochs per task"
        return title, experiments, (ORACLE, DIVIDED)


class Figure1(DataOptions, CifarTable):
    """Reproduces, beside the paper's numbers, Figure 1, ACC, BWT and FWT of all learners on three streams."""

    name = "figure1"

    streams: tuple[PaperStream, ...] = ("permutations", "rotations", "cifar100")
    """panels of the figure"""

    def spec(self) -> Spec:
        """All learners of the paper on all streams, and two more."""
        experiments = []
        for stream in self.streams:
            for learner in CIFAR_LEARNERS if stream == "cifar100" else DIGIT_LEARNERS:
                condition, config = {"stream": stream, "learner": learner}, self.config(stream, learner)
                paper = published.PAPER_FIGURE1.get((stream, learner), {})
                is_joint = learner == "joint"  # which has no first task
                measures = ("acc",) if is_joint else MEASURES
                experiments.append(Experiment(condition, config, measures, paper, None if is_joint else "first_task"))
        note = "The paper's figure prints no numbers: here they are of the matrices of its Appendix B, divided by T."
        title = "Figure 1: ACC, BWT and FWT, and the first task along the stream"
        return title, experiments, (ORACLE, DIVIDED, note)


class Descriptors(DataOptions, CifarTable):
    """Compares GEM told what each task is about with GEM that is not, also on tasks not yet seen."""

    name = "descriptors"

    streams: tuple[PaperStream, ...] = ("rotations", "permutations")
    """kinds of tasks"""
    samples_per_task: Whole | None = None
    """training examples of each task; None: as published"""
    memory_batch: Whole | None = None
    """examples that gem draws of each past task for a step; None: all, as published"""

    def spec(self) -> Spec:
        """Both orders of the tasks, with every descriptor that the stream has and with none."""
        # All measures, and the curve, are of the ends of tasks.
        common: dict[str, Any] = {"eval_every": 10**9}
        notes = [ZERO_SHOT, DIVIDED]
        if self.samples_per_task is not None:
            common["samples_per_task"] = self.samples_per_task
            notes.append(f"Each task has {self.samples_per_task} training examples.")
        experiments = []
        for stream in self.streams:
            # Which class it is, one-hot, makes the network without a descriptor.
            kinds = ("text",) if stream == "cifar100" else DESCRIPTORS[stream]
            for order, shuffle_tasks in (("natural", False), ("random", True)):
                for kind in (None, *kinds):
                    more = common | {"descriptor": kind, "shuffle_tasks": shuffle_tasks}
                    config = self.config(stream, "gem", memory_batch=self.memory_batch, **more)
                    condition = {"stream": stream, "order": order, "descriptor": kind or "none"}
                    experiments.append(Experiment(condition, config, (*MEASURES, "zero_shot"), curve="zero_shot"))
        return "Task descriptors: GEM told what each task is about, and not", experiments, tuple(notes)


TABLES: tuple[type[PaperTable], ...] = (Table1, Table2, Table3, Figure1, Descriptors)
