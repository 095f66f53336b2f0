"""What accuracy costs: ACC over training time of exact GEM, its two approximations, A-GEM, single and EWC.

    python bench/bench_pareto.py [--seeds 0 1 2 3 4] [--data FOLDER] [--run-cache DIR] [--rounds 3]
                                  [--streams rotations permutations] [--name pareto]

Writes results/NAME.json and results/NAME.png beside this file. The runs that give ACC are not computed again where
they are finished; on a busy machine they take longer and nothing else. Their training time is then measured: all
methods in turn, one seed on 5000 digits, medians over the rounds.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import THREADS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gem_fast.paper.experiments.run_cache import run_cached
from gem_fast.paper.experiments.training_run import RunConfig, TrainingRun, configuration
from gem_fast.paper.learners import PRESETS
from gem_fast.paper.reports.result_table import MeanStd, machine
from gem_fast.paper.streams.config import STREAM_CONFIGS

RESULTS = Path(__file__).parent / "results"
TIMED_SEED = 1  # with seed 0 and two threads, r = 2 with m' = 8 diverges at the published learning rate


class Method(NamedTuple):
    """One point of the picture: how it is called, its group, its learner and what differs from the presets."""

    name: str
    group: str
    learner: str
    options: dict[str, Any]

    def __hash__(self) -> int:
        return hash(self.name)


METHODS = (
    Method("exact", "GEM, exact", "gem", {}),
    *(Method(f"m' = {m}", "GEM, m' of 256 examples a step", "gem", {"memory_batch": m}) for m in (64, 32, 16, 8, 4, 2)),
    *(
        Method(f"m' = {m}, r = {r}", "GEM, both", "gem", {"memory_batch": m, "refresh_every": r})
        for m in (16, 8)
        for r in (2, 4)
    ),
    Method("A-GEM", "A-GEM", "agem", {}),
    Method("A-GEM, margin .5", "A-GEM", "agem", {"lr": 0.1, "margin": 0.5}),
    Method("single", "single, EWC", "single", {}),
    Method("EWC", "single, EWC", "ewc", {}),
)
# Colours that colour-blind people can tell apart, with a marker of its own each, and where the names go (x, y).
STYLES = {
    "GEM, exact": ("#000000", "*", (1, 0)),
    "GEM, m' of 256 examples a step": ("#0072B2", "o", (0, 1)),
    "GEM, both": ("#009E73", "P", (1, -1)),
    "A-GEM": ("#CC79A7", "^", (1, 0)),
    "single, EWC": ("#7F7F7F", "D", (0, -1)),
}
# Groups whose points are one method with more or less of something.
JOINED = ("GEM, m' of 256 examples a step",)


def main() -> None:
    parser = argparse.ArgumentParser(description="ACC over training time of GEM and what is cheaper.")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--data", default="mnist-5k", help="as for the command line: a folder with all of MNIST, say")
    parser.add_argument("--run-cache", type=Path, default=RESULTS / "pareto_run_cache")
    parser.add_argument("--rounds", type=int, default=3, help="how often each method's training time is measured")
    parser.add_argument("--streams", nargs="+", choices=STREAM_CONFIGS, default=["rotations", "permutations"])
    parser.add_argument("--name", default="pareto", help="of the files that are written")
    args = parser.parse_args()
    keys = [(stream, method) for stream in args.streams for method in METHODS if (stream, method.learner) in PRESETS]
    configs = {
        (stream, method, seed): config_of(stream, method, seed=seed, data=args.data)
        for stream, method in keys
        for seed in args.seeds
    }
    records = dict(zip(configs, run_cached(args.run_cache, list(configs.values())), strict=True))
    torch.set_num_threads(THREADS)
    seconds: dict[tuple[str, Method], list[float]] = {key: [] for key in keys}
    # Round by round, so that a machine that changes its speed changes it for all methods.
    for _ in range(args.rounds):
        for key, values in seconds.items():
            values.append(TrainingRun(config_of(*key, seed=TIMED_SEED)).run().train_seconds)
    points = []
    for stream, method in keys:
        mine = [record for seed in args.seeds if (record := records[stream, method, seed]) is not None]
        points.append(
            {
                "stream": stream,
                "method": method.name,
                "group": method.group,
                "acc": MeanStd(tuple(record.acc for record in mine)).to_dict(),
                "bwt": MeanStd(tuple(record.bwt for record in mine)).to_dict(),
                "seconds": seconds[stream, method],
                "median_seconds": statistics.median(seconds[stream, method]),
            }
        )
    result = {"seeds": list(args.seeds), "data": Path(args.data).name, "machine": machine(), "points": points}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(args.streams, points).savefig(RESULTS / f"{args.name}.png")
    print("| stream | method | ACC | BWT | seconds |\n|---|---|---|---|---|")
    for point in points:
        acc, bwt, took = (point[name] for name in ("acc", "bwt", "median_seconds"))
        print(
            f"| {point['stream']} | {point['method']} | {acc['mean']:.3f} ± {acc['std'] or 0:.3f} | {bwt['mean']:+.3f} "
            f"| {took:.2f} |"
        )


def config_of(stream: str, method: Method, **options: Any) -> RunConfig:
    """What a run does; it is evaluated at the end of each task alone."""
    return configuration(stream, method.learner, eval_every=100, **options, **method.options)


class Line(NamedTuple):
    """Points with error bars: x and ACC of each, and what errorbar of matplotlib is told of their looks."""

    x: list[float]
    acc: list[float]
    std: list[float]
    looks: dict[str, Any]


def draw_acc(lines: dict[str, list[Line]], width: float, height: float, label: str) -> Figure:
    """ACC over what `label` says, on a log scale: the lines of each stream in a panel of `width` times `height`."""
    figure = Figure(figsize=(width * len(lines), height), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(lines), squeeze=False)[0]
    for axes, (stream, of_stream) in zip(panels, lines.items(), strict=True):
        for x, acc, std, looks in of_stream:
            axes.errorbar(x, acc, std, capsize=3, **looks)
        axes.set(xscale="log", xlabel=label, ylabel="ACC", title=stream)
        axes.grid(alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def draw(streams: list[str], points: list[dict[str, Any]]) -> Figure:
    lines: dict[str, list[Line]] = {stream: [] for stream in streams}
    for stream, group in itertools.product(streams, STYLES):
        mine = [point for point in points if point["stream"] == stream and point["group"] == group]
        x, acc = [point["median_seconds"] for point in mine], [point["acc"]["mean"] for point in mine]
        colour, marker, _ = STYLES[group]
        style = "-" if group in JOINED else ""
        looks = {"color": colour, "marker": marker, "markersize": 8, "ls": style, "lw": 1, "label": group}
        lines[stream].append(Line(x, acc, [point["acc"]["std"] or 0.0 for point in mine], looks))
    figure = draw_acc(lines, 6, 5.2, "training time (seconds, log scale)")
    for axes, stream in zip(figure.axes, streams, strict=True):
        axes.margins(x=0.18, y=0.1)
        for point in points:
            if point["stream"] == stream:
                annotate(axes, point)
    return figure


def annotate(axes: Axes, point: dict[str, Any]) -> None:
    """Writes a method's name above or below its error bar, or beside its point."""
    group, x, y, error = point["group"], point["median_seconds"], point["acc"]["mean"], point["acc"]["std"] or 0.0
    colour, _, (right, up) = STYLES[group]
    axes.annotate(
        point["method"].removeprefix("m' = ") if group in JOINED else point["method"],
        (x, y + up * error if up else y),
        xytext=(10 * right, 4 * up),
        textcoords="offset points",
        color=colour,
        fontsize=8,
        ha={-1: "right", 0: "center", 1: "left"}[right],
        va={-1: "top", 0: "center", 1: "bottom"}[up],
    )


if __name__ == "__main__":
    main()
