"""The pictures of the result tables.

Colours are Okabe and Ito's, which readers of every colour vision can tell apart; each learner has its own marker, too.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gem_fast.paper.reports.published import MEASURES
from gem_fast.paper.reports.result_table import TITLES, ResultTable, Row
from gem_fast.paper.reports.run_plots import INK, figure_of_size, light_axes, png

# learner, or what it is told -> colour, marker, name
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
    "none": ("#8C8C8C", "o", "told nothing"),
    "one-hot": ("#0072B2", "s", "told which task it is"),
    "angle": ("#D55E00", "*", "told its angle"),
    "text": ("#009E73", "^", "told the names of its classes"),
}
HOLLOW: dict[str, Any] = {"marker": "o", "linestyle": "", "markerfacecolor": "white", "markeredgecolor": INK}


# table -> the condition that its bars are grouped by, what that is called, and the measure of each panel
GROUPS = {
    "table1": ("stream", None, ("seconds",)),
    "table2": ("memory", "examples in memory, all tasks together", ("acc",)),
    "table3": ("epochs", "epochs per task", ("acc", "bwt")),
}


def _table(table: ResultTable) -> Figure:
    """Bars of each measure."""
    group, label, measures = GROUPS[table.name]
    figure, grid = _panels(table, width=11, height=4.8, columns=len(measures))
    for axes, measure in zip(grid, measures, strict=True):
        _bars(axes, {value: [(row, measure) for row in rows] for value, rows in _by(table, group).items()})
        axes.set(xlabel=label, ylabel=TITLES.get(measure, "training time (s)"))
        if measure == "seconds":
            seconds = [
                value
                for row in table.rows
                for value in (*row.paper.values(), *(each.mean for each in row.ours.values()))
            ]
            axes.set(ylim=(min(seconds) / 2, max(seconds) * 2), yscale="log")
            axes.yaxis.set_major_formatter("{x:g}")
    _legend(figure, _by(table, "learner"))
    return figure


def _figure1(table: ResultTable) -> Figure:
    """A row for each stream: bars of ACC, BWT and FWT, and the first task along the stream."""
    streams = _by(table, "stream")
    figure, grid = _panels(table, width=13, height=1.2 + 3.4 * len(streams), rows=len(streams), columns=2)
    for bars, curves, (stream, rows) in zip(grid[::2], grid[1::2], streams.items(), strict=True):
        _bars(bars, {TITLES[measure]: [(row, measure) for row in rows] for measure in MEASURES})
        _curves(curves, rows, "first_task", "learner")
        bars.set_title(stream, loc="left", fontweight="bold")
        curves.set_title(f"{stream}: accuracy on the first task", loc="left")
    _legend(figure, _by(table, "learner"))
    return figure


def _descriptors(table: ResultTable) -> Figure:
    """Accuracy on the tasks not yet seen: a row for each stream, a column for each order of its tasks."""
    panels = [(stream, order) for stream in _by(table, "stream") for order in _by(table, "order")]
    figure, grid = _panels(table, width=11, height=1.2 + 1.7 * len(panels), rows=len(panels) // 2, columns=2)
    for axes, panel in zip(grid, panels, strict=True):
        rows = [row for row in table.rows if (row.condition["stream"], row.condition["order"]) == panel]
        _curves(axes, rows, "zero_shot", "descriptor")
        axes.set_title("{}, {} order".format(*panel), loc="left")
        axes.set_ylabel("accuracy on tasks not yet seen")
    _legend(figure, _by(table, "descriptor"), paper=False)
    return figure


def _bars(axes: Axes, groups: dict[Any, list[tuple[Row, str]]]) -> None:
    """Groups of bars, by what is written below them: measures of rows, and the paper's as circles."""
    for x, bars in enumerate(groups.values()):
        width = 0.85 / len(bars)
        for i, (row, measure) in enumerate(bars):
            place, color = x + (i - (len(bars) - 1) / 2) * width, STYLES[row.condition["learner"]][0]
            if ours := row.ours.get(measure):
                bar = axes.bar(place, ours.mean, width * 0.92, color=color, yerr=ours.std, ecolor=INK)
                axes.bar_label(bar, fmt="{:.3g} s" if measure == "seconds" else "", padding=2)
                axes.plot(place, row.paper.get(measure, np.nan), **HOLLOW, markersize=4)
    axes.set_xticks(range(len(groups)), list(map(str, groups)))
    axes.axhline(0, color=INK, linewidth=0.8)
    light_axes(axes, "y")


def _curves(axes: Axes, rows: Sequence[Row], name: str, style: str) -> None:
    drawn = [row for row in rows if name in row.curves]  # what diverged has none
    for row in drawn:
        x, points = row.curves[name]
        mean = np.array([point.mean for point in points])
        std = np.array([point.std or 0 for point in points])
        color, marker, _ = STYLES[row.condition[style]]
        axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        axes.plot(x, mean, color=color, marker=marker, markersize=4, markevery=max(1, len(x) // 10), linewidth=1.5)
    axes.set(xlim=(0, max((row.curves[name][0][-1] for row in drawn), default=1)), ylim=(0, 1), xlabel="tasks learned")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    light_axes(axes, "y")


def _panels(
    table: ResultTable, width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure with the table's title and labels, and its axes, row by row."""
    lines = [line for text in (table.title, *table.labels) for line in textwrap.wrap(text, int(width * 10))]
    figure = figure_of_size(width, height + 0.22 * (len(lines) - 1))
    figure.suptitle("\n".join(lines), fontsize=11, color="#A00000" if table.labels else INK)
    return figure, list(np.ravel(figure.subplots(rows, columns)))


def _legend(figure: Figure, names: Any, paper: bool = True) -> None:
    styles = [STYLES[name] for name in names]
    handles = [Line2D([], [], color=color, marker=marker, markersize=7, label=name) for color, marker, name in styles]
    handles += [Line2D([], [], **HOLLOW, label="paper")] * paper
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _by(table: ResultTable, name: str) -> dict[Any, list[Row]]:
    """The rows by one of their conditions, in order."""
    values = dict.fromkeys(row.condition[name] for row in table.rows)
    return {value: [row for row in table.rows if row.condition[name] == value] for value in values}


FIGURES = {"figure1": _figure1, "descriptors": _descriptors}


def draw(table: ResultTable) -> bytes:
    """The picture of a table, by its name, as a PNG file."""
    return png(FIGURES.get(table.name, _table)(table))
