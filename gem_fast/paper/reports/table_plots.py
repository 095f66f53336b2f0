"""The pictures of the tables and of Figure 1.

Colours are Okabe and Ito's, which readers of every colour vision can tell apart; each learner has its own marker, too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from gem_fast.paper.reports.result_table import TITLES, MeanStd, ResultTable, Row
from gem_fast.paper.reports.run_plots import INK, figure_of_size, png

__all__ = ["DRAWINGS"]

# learner -> colour, marker, name
STYLES = {
    "joint": ("#000000", "X", "joint (oracle)"),
    "single": ("#8C8C8C", "o", "single"),
    "independent": ("#56B4E9", "s", "independent"),
    "multimodal": ("#009E73", "^", "multimodal"),
    "icarl": ("#CC79A7", "D", "iCaRL"),
    "ewc": ("#E69F00", "v", "EWC"),
    "agem": ("#0072B2", "P", "A-GEM"),
    "gem": ("#D55E00", "*", "GEM"),
    "gem_pure_python": ("#7A3300", "h", "GEM, pure Python"),
}
PAPER = Line2D([], [], linestyle="", marker="o", markerfacecolor="white", markeredgecolor=INK, label="paper")


def _table1(table: ResultTable) -> Figure:
    """Horizontal bars of seconds, one panel per stream."""
    streams = list(dict.fromkeys(row.condition["stream"] for row in table.rows))
    figure, grid = _panels(table, width=11, height=4.6, columns=len(streams))
    for axes, stream in zip(grid, streams, strict=True):
        rows = [row for row in table.rows if row.condition["stream"] == stream]
        for y, row in enumerate(rows):
            seconds = row.ours["seconds"]
            axes.barh(
                y, seconds.mean, height=0.6, color=STYLES[row.condition["learner"]][0], xerr=seconds.std, ecolor=INK
            )
            if "seconds" in row.paper:
                axes.plot(row.paper["seconds"], y, "o", markerfacecolor="white", markeredgecolor=INK, zorder=3)
        names = [f"{STYLES[row.condition['learner']][2]}\n{_duration(row.ours['seconds'].mean)}" for row in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ends = [row.ours["seconds"].mean for row in rows] + [row.paper.get("seconds", 1) for row in rows]
        axes.set_xlim(min(ends) / 2, max(ends) * 2)
        axes.set_xlabel("training time (s)")
        axes.set_title(stream)
        _light(axes, "x")
    figure.legend(handles=[PAPER], loc="outside lower center", frameon=False)
    return figure


def _table2(table: ResultTable) -> Figure:
    """ACC against the examples in memory."""
    figure, (axes,) = _panels(table, width=7.5, height=5)
    for learner in _learners(table):
        rows = [row for row in table.rows if row.condition["learner"] == learner]
        _line(axes, learner, [row.condition["memory"] for row in rows], [row.ours["acc"] for row in rows])
        if not table.flags["stand_in"]:
            axes.plot(
                [row.condition["memory"] for row in rows], [row.paper["acc"] for row in rows], "--o",
                color=STYLES[learner][0], markerfacecolor="white", linewidth=1,
            )  # fmt: skip
    memories = sorted({row.condition["memory"] for row in table.rows})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(memories))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("examples in memory, all tasks together")
    axes.set_ylabel("ACC")
    _light(axes, "y")
    _legend(figure, table, paper=not table.flags["stand_in"])
    return figure


def _table3(table: ResultTable) -> Figure:
    """ACC and BWT against epochs; the paper's values are hollow."""
    figure, grid = _panels(table, width=11, height=5.2, columns=2)
    learners = _learners(table)
    epochs = sorted({row.condition["epochs"] for row in table.rows})
    for axes, measure in zip(grid, ("acc", "bwt"), strict=True):
        for i, learner in enumerate(learners):
            rows = [row for row in table.rows if row.condition["learner"] == learner and measure in row.ours]
            shift = 0.5 * (i / max(1, len(learners) - 1) - 0.5)  # side by side, so that error bars do not overlap
            x = [epochs.index(row.condition["epochs"]) + shift for row in rows]
            _line(axes, learner, x, [row.ours[measure] for row in rows])
            axes.plot(
                x, [row.paper[measure] for row in rows], STYLES[learner][1], markerfacecolor="white",
                markeredgecolor=STYLES[learner][0], color=STYLES[learner][0], markersize=6, alpha=0.9,
            )  # fmt: skip
        axes.set_xticks(range(len(epochs)), [str(number) for number in epochs])
        axes.set_xlim(-0.5, len(epochs) - 0.5)
        for boundary in range(1, len(epochs)):
            axes.axvline(boundary - 0.5, color=INK, alpha=0.12, linewidth=0.8)
        axes.set_xlabel("epochs per task")
        axes.set_ylabel(TITLES[measure])
        _light(axes, "y")
    grid[1].axhline(0, color=INK, linewidth=0.8)
    _legend(figure, table, paper=True)
    return figure


def _figure1(table: ResultTable) -> Figure:
    """A row for each stream: bars of ACC, BWT and FWT, and the first task along the stream."""
    streams = list(dict.fromkeys(row.condition["stream"] for row in table.rows))
    figure, grid = _panels(table, width=13, height=1.2 + 3.4 * len(streams), rows=len(streams), columns=2)
    for bars, curves, stream in zip(grid[::2], grid[1::2], streams, strict=True):
        rows = [row for row in table.rows if row.condition["stream"] == stream]
        _bars(bars, rows)
        _curves(curves, rows)
        bars.set_title(stream, loc="left", fontweight="bold")
        curves.set_title(f"{stream}: accuracy on the first task", loc="left")
    _legend(figure, table, paper=True)
    return figure


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    width = 0.85 / len(rows)
    for i, row in enumerate(rows):
        for group, measure in enumerate(("acc", "bwt", "fwt")):
            x = group + (i - (len(rows) - 1) / 2) * width
            ours = row.ours[measure]
            color = STYLES[row.condition["learner"]][0]
            axes.bar(x, ours.mean, width * 0.92, color=color, yerr=ours.std, error_kw={"ecolor": INK, "lw": 1})
            if measure in row.paper:
                axes.plot(x, row.paper[measure], "o", markersize=4, markerfacecolor="white", markeredgecolor=INK)
    axes.set_xticks(range(3), ["ACC", "BWT", "FWT"])
    axes.axhline(0, color=INK, linewidth=0.8)
    _light(axes, "y")


def _curves(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        assert row.curve is not None
        x, points = row.curve
        mean = np.array([point.mean for point in points])
        std = np.array([point.std or 0 for point in points])
        color, marker, _ = STYLES[row.condition["learner"]]
        axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        axes.plot(x, mean, color=color, marker=marker, markersize=4, markevery=max(1, len(x) // 10), linewidth=1.5)
    axes.set_xlim(0, max(row.curve[0][-1] for row in rows if row.curve is not None))
    axes.set_ylim(0, 1)
    axes.set_xlabel("tasks learned")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _light(axes, "y")


def _line(axes: Axes, learner: str, x: Sequence[float], measures: Sequence[MeanStd]) -> None:
    color, marker, _ = STYLES[learner]
    error = [measure.std or 0 for measure in measures] if any(measure.std for measure in measures) else None
    means = [measure.mean for measure in measures]
    size = 11 if marker == "*" else 7
    axes.errorbar(x, means, error, color=color, marker=marker, markersize=size, linewidth=1.5, capsize=3, capthick=1)


def _panels(
    table: ResultTable, width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure with the table's title and labels, and its axes, row by row."""
    lines = [line for text in (table.title, *table.labels) for line in textwrap.wrap(text, int(width * 10))]
    figure = figure_of_size(width, height + 0.22 * (len(lines) - 1))
    figure.suptitle("\n".join(lines), fontsize=11, color="#A00000" if table.labels else INK)
    return figure, list(np.ravel(figure.subplots(rows, columns)))


def _legend(figure: Figure, table: ResultTable, paper: bool) -> None:
    handles = [
        Line2D([], [], color=STYLES[learner][0], marker=STYLES[learner][1], markersize=7, label=STYLES[learner][2])
        for learner in _learners(table)
    ]
    if paper:
        handles.append(PAPER)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _learners(table: ResultTable) -> list[str]:
    return list(dict.fromkeys(row.condition["learner"] for row in table.rows))


def _light(axes: Axes, axis: Any) -> None:
    axes.grid(axis=axis, color=INK, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


def _bytes(draw: Callable[[ResultTable], Figure]) -> Callable[[ResultTable], bytes]:
    return lambda table: png(draw(table))


# subcommand -> result table -> PNG file
DRAWINGS: dict[str, Callable[[ResultTable], bytes]] = {
    "table1": _bytes(_table1),
    "table2": _bytes(_table2),
    "table3": _bytes(_table3),
    "figure1": _bytes(_figure1),
}
