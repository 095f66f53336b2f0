"""What accuracy costs: ACC over training time of exact GEM, its two approximations, A-GEM, single and EWC.

    python bench/bench_pareto.py [--seeds 0 1 2 3 4] [--data FOLDER] [--run-cache DIR] [--rounds 3]
                                  [--streams rotations permutations] [--name pareto]

Writes results/NAME.json and results/NAME.png beside this file. The runs that give ACC are not computed again where
they are finished; on a busy machine they take longer and nothing else. Their training time is then measured: all
methods in turn, one seed on 5000 digits, medians over the rounds.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import THREADS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gem_fast.paper.experiments.run_cache import run_cached
from gem_fast.paper.experiments.training_run import Config, TrainingRun, configuration
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


def config_of(stream: str, method: Method, **options: Any) -> Config:
    """What a run does; it is evaluated at the end of each task alone."""
    return configuration(stream, method.learner, eval_every=100, **options, **method.options)


def draw(streams: list[str], points: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6 * len(streams), 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, stream in zip(figure.subplots(1, len(streams), squeeze=False)[0], streams, strict=True):
        for group, (colour, marker, place) in STYLES.items():
            mine = [point for point in points if point["stream"] == stream and point["group"] == group]
            x = [point["median_seconds"] for point in mine]
            y = [point["acc"]["mean"] for point in mine]
            error = [point["acc"]["std"] or 0.0 for point in mine]
            line = "-" if group in JOINED else ""
            axes.errorbar(x, y, error, color=colour, marker=marker, markersize=8, ls=line, lw=1, capsize=3, label=group)
            for point, *at in zip(mine, x, y, error, strict=True):
                # Above or below the bar, or beside the point.
                end = (at[0], at[1] + place[1] * at[2] if place[1] else at[1])
                name = point["method"].removeprefix("m' = ") if group in JOINED else point["method"]
                axes.annotate(
                    name,
                    end,
                    xytext=(10 * place[0], 4 * place[1]),
                    textcoords="offset points",
                    color=colour,
                    fontsize=8,
                    ha={-1: "right", 0: "center", 1: "left"}[place[0]],
                    va={-1: "top", 0: "center", 1: "bottom"}[place[1]],
                )
        axes.set_xscale("log")
        axes.set_xlabel("training time (seconds, log scale)")
        axes.set_ylabel("ACC")
        axes.set_title(stream)
        axes.grid(alpha=0.15)
        axes.margins(x=0.18, y=0.1)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


if __name__ == "__main__":
    main()
