"""What the choice of the examples is worth: GEM's ACC over the memory's size, for every memory policy.

    python bench/bench_memory_policies.py [--streams rotations permutations split] [--sizes 2 5 10 20 50 256]
        [--seeds 0 1 2 3 4] [--data FOLDER] [--cifar ARCHIVE]

Writes a line of JSON per run to results/memory_policies.jsonl beside this file, and draws results/memory_policies.png
of all lines there with these streams and data. Finished runs are not computed again.
"""

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from bench_pareto import Line, draw_acc
from matplotlib.figure import Figure
from torch import Tensor

from gem_fast import MEMORY_POLICIES
from gem_fast.paper.experiments.training_run import TrainingRun, configuration
from gem_fast.paper.reports.result_table import MeanStd
from gem_fast.paper.streams import Stream

RESULTS = Path(__file__).parent / "results"
# A small run of real CIFAR-100: a sample of the memory in each step, few examples of each task.
CIFAR = {"samples_per_task": 250, "memory_batch": 8}
# Colours that colour-blind people can tell apart, with a marker of its own each.
STYLES = [("#7F7F7F", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#D55E00", "*"), ("#CC79A7", "D"), ("#E69F00", "v")]

# What a line says of its run beside ACC and BWT.
KEY = ("stream", "data", "policy", "per_task", "seed")

Points = dict[tuple[str, str, int], MeanStd]
"""ACC by stream, policy and size."""


def main() -> None:
    parser = argparse.ArgumentParser(description="ACC over the memory's size, for every memory policy.")
    parser.add_argument("--streams", nargs="*", default=["rotations", "permutations", "split"])
    parser.add_argument("--policies", nargs="+", default=list(MEMORY_POLICIES), choices=list(MEMORY_POLICIES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[2, 5, 10, 20, 50, 256], help="examples of each task")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--data", default="mnist-5k", help="as for the command line: a folder with all of MNIST, say")
    parser.add_argument("--cifar", help="a folder or archive of CIFAR-100, for short runs on it")
    parser.add_argument("--runs", type=Path, default=RESULTS / "memory_policies.jsonl", help="where the lines go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    streams: list[tuple[str, str, dict[str, Any]]] = [(stream, args.data, {}) for stream in args.streams]
    if args.cifar is not None:
        streams.append(("cifar100", args.cifar, CIFAR))
    finished = {tuple(run[name] for name in KEY) for run in read(args.runs)}
    # Seed by seed, so that an early picture has all policies.
    for seed in args.seeds:
        for stream, name, options in streams:
            for size in args.sizes:
                for policy in args.policies:
                    key = stream, Path(name).name, policy, size, seed
                    if key not in finished:
                        result = measure(stream, name, policy, size, seed, options)
                        with args.runs.open("a") as file:
                            file.write(json.dumps(dict(zip(KEY, key, strict=True)) | result) + "\n")
    mine = {(stream, Path(name).name) for stream, name, _ in streams}
    points = summary([run for run in read(args.runs) if (run["stream"], run["data"]) in mine])
    draw(points).savefig(args.runs.with_suffix(".png"))
    print_table(points)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(stream: str, data: str, policy: str, size: int, seed: int, options: dict[str, Any]) -> dict[str, float]:
    """ACC and BWT of one run, evaluated when a task ends."""
    run = TrainingRun(
        configuration(
            stream,
            "gem",
            data=data,
            seed=seed,
            memory_policy=policy,
            memory_per_task=size,
            eval_every=2**31 - 1,
            **options,
        )
    )
    run.stream = cast(Stream, TestsThatCount(run.stream, [experience.task for experience in run.schedule.experiences]))
    record = run.run()
    return {"acc": record.acc, "bwt": record.bwt}


class TestsThatCount:
    """A stream with the tests that ACC and BWT need: a task's own at its end, all in the end, else one example each.

    A convolutional network would take longer for the others than for training.
    """

    def __init__(self, stream: Stream, learned: Sequence[int]) -> None:
        self._stream = stream
        self._needed: list[set[int]] = [set(), *({task} for task in learned[:-1]), set(range(stream.n_tasks))]
        self._asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def test_batches(self, task: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As of the stream, where they count; an evaluation asks for each task once."""
        evaluation, self._asked = self._asked // self._stream.n_tasks, self._asked + 1
        batches = self._stream.test_batches(task)
        if task in self._needed[evaluation]:
            yield from batches
        else:
            x, y = next(batches)
            yield x[:1], y[:1]


def summary(runs: list[dict[str, Any]]) -> Points:
    values = defaultdict(list)
    order = list(MEMORY_POLICIES)
    for run in sorted(runs, key=lambda run: (run["stream"], order.index(run["policy"]), run["seed"])):
        values[run["stream"], run["policy"], run["per_task"]].append(run["acc"])
    return {key: MeanStd(tuple(accs)) for key, accs in values.items()}


def draw(points: Points) -> Figure:
    streams, policies = (list(dict.fromkeys(key[i] for key in points)) for i in (0, 1))
    sizes = sorted({key[2] for key in points})
    lines: dict[str, list[Line]] = {stream: [] for stream in streams}
    for stream, (policy, (colour, marker)) in itertools.product(streams, zip(policies, STYLES, strict=False)):
        mine = [size for size in sizes if (stream, policy, size) in points]
        accs = [points[stream, policy, size] for size in mine]
        looks = {"color": colour, "marker": marker, "lw": 1.2, "label": policy}
        lines[stream].append(Line(mine, [acc.mean for acc in accs], [acc.std or 0.0 for acc in accs], looks))
    figure = draw_acc(lines, 5, 4.6, "examples of each task in memory (log scale)")
    for axes in figure.axes:
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
    return figure


def print_table(points: Points) -> None:
    sizes = sorted({key[2] for key in points})
    print("| stream | policy | " + " | ".join(map(str, sizes)) + " |")
    print("|---|---|" + "---|" * len(sizes))
    for stream, policy in dict.fromkeys(key[:2] for key in points):
        mine = [points.get((stream, policy, size)) for size in sizes]
        cells = [
            "" if acc is None else f"{acc.mean:.3f}" + ("" if acc.std is None else f" ± {acc.std:.3f}") for acc in mine
        ]
        print(f"| {stream} | {policy} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
