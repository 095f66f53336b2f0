"""The pictures of the tables and of Figure 1.

Colours are Okabe and Ito's, which readers of every colour vision can tell apart; each learner has its own marker, too.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gem_fast.paper.reports.published import MEASURES
from gem_fast.paper.reports.result_table import TITLES, MeanStd, ResultTable, Row
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
PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:g}")


def _table1(table: ResultTable) -> Figure:
    """Horizontal bars of seconds, one panel per stream."""
    streams = _by(table, "stream")
    figure, grid = _panels(table, width=11, height=4.6, columns=len(streams))
    for axes, (stream, rows) in zip(grid, streams.items(), strict=True):
        styles = [STYLES[row.condition["learner"]] for row in rows]
        seconds = [row.ours["seconds"] for row in rows]
        for y, (row, (color, *_), ours) in enumerate(zip(rows, styles, seconds, strict=True)):
            axes.barh(y, ours.mean, height=0.6, color=color, xerr=ours.std, ecolor=INK)
            axes.plot(row.paper.get("seconds", np.nan), y, **HOLLOW, zorder=3)
        names = [f"{name}\n{_duration(ours.mean)}" for (*_, name), ours in zip(styles, seconds, strict=True)]
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        ends = [ours.mean for ours in seconds] + [row.paper.get("seconds", 1) for row in rows]
        axes.set(xscale="log", xlim=(min(ends) / 2, max(ends) * 2), xlabel="training time (s)", title=stream)
        axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
        light_axes(axes, "x")
    _legend(figure, [])
    return figure


def _table2(table: ResultTable) -> Figure:
    """ACC against the examples in memory; the paper's values are hollow."""
    figure, (axes,) = _panels(table, width=7.5, height=5)
    learners = _by(table, "learner")
    for learner, rows in learners.items():
        x = [row.condition["memory"] for row in rows]
        _line(axes, learner, x, [row.ours["acc"] for row in rows])
        paper = [row.paper.get("acc", np.nan) for row in rows]
        axes.plot(x, paper, "--o", color=STYLES[learner][0], markerfacecolor="white", linewidth=1)
    axes.set(xscale="log", xlabel="examples in memory, all tasks together", ylabel="ACC")
    axes.set_xticks(list(_by(table, "memory")))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
    light_axes(axes, "y")
    _legend(figure, learners)
    return figure


def _table3(table: ResultTable) -> Figure:
    """ACC and BWT against epochs; the paper's values are hollow."""
    figure, grid = _panels(table, width=11, height=5.2, columns=2)
    learners, epochs = _by(table, "learner"), sorted(_by(table, "epochs"))
    for axes, measure in zip(grid, ("acc", "bwt"), strict=True):
        for shift, (learner, all_rows) in zip(np.linspace(-0.25, 0.25, len(learners)), learners.items(), strict=True):
            rows = [row for row in all_rows if measure in row.ours]
            x = [epochs.index(row.condition["epochs"]) + shift for row in rows]  # side by side: error bars overlap else
            _line(axes, learner, x, [row.ours[measure] for row in rows])
            color, marker, _ = STYLES[learner]
            paper = [row.paper[measure] for row in rows]
            axes.plot(x, paper, marker, color=color, markerfacecolor="white", markersize=6, alpha=0.9)
        axes.set_xticks(range(len(epochs)), [str(number) for number in epochs])
        axes.set(xlim=(-0.5, len(epochs) - 0.5), xlabel="epochs per task", ylabel=TITLES[measure])
        for boundary in range(1, len(epochs)):
            axes.axvline(boundary - 0.5, color=INK, alpha=0.12, linewidth=0.8)
        light_axes(axes, "y")
    grid[1].axhline(0, color=INK, linewidth=0.8)
    _legend(figure, learners)
    return figure


def _figure1(table: ResultTable) -> Figure:
    """A row for each stream: bars of ACC, BWT and FWT, and the first task along the stream."""
    streams = _by(table, "stream")
    figure, grid = _panels(table, width=13, height=1.2 + 3.4 * len(streams), rows=len(streams), columns=2)
    for bars, curves, (stream, rows) in zip(grid[::2], grid[1::2], streams.items(), strict=True):
        _bars(bars, rows)
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


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    width = 0.85 / len(rows)
    for i, row in enumerate(rows):
        color = STYLES[row.condition["learner"]][0]
        x = np.arange(len(MEASURES)) + (i - (len(rows) - 1) / 2) * width
        means, errors = _means_and_errors([row.ours[measure] for measure in MEASURES])
        axes.bar(x, means, width * 0.92, color=color, yerr=errors, error_kw={"ecolor": INK, "lw": 1})
        axes.plot(x, [row.paper.get(measure, np.nan) for measure in MEASURES], **HOLLOW, markersize=4)
    axes.set_xticks(range(len(MEASURES)), [TITLES[measure] for measure in MEASURES])
    axes.axhline(0, color=INK, linewidth=0.8)
    light_axes(axes, "y")


def _curves(axes: Axes, rows: Sequence[Row], name: str, style: str) -> None:
    for row in rows:
        x, points = row.curves[name]
        mean = np.array([point.mean for point in points])
        std = np.array([point.std or 0 for point in points])
        color, marker, _ = STYLES[row.condition[style]]
        axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        axes.plot(x, mean, color=color, marker=marker, markersize=4, markevery=max(1, len(x) // 10), linewidth=1.5)
    axes.set(xlim=(0, max(row.curves[name][0][-1] for row in rows)), ylim=(0, 1), xlabel="tasks learned")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    light_axes(axes, "y")


def _line(axes: Axes, learner: str, x: Sequence[float], measures: Sequence[MeanStd]) -> None:
    color, marker, _ = STYLES[learner]
    size = 11 if marker == "*" else 7
    style: dict[str, Any] = {"color": color, "marker": marker, "markersize": size, "linewidth": 1.5}
    axes.errorbar(x, *_means_and_errors(measures), **style, capsize=3, capthick=1)


def _means_and_errors(measures: Sequence[MeanStd]) -> tuple[list[float], list[float] | None]:
    """Means, and standard deviations where there are several seeds."""
    is_of_several = any(measure.std is not None for measure in measures)
    return [each.mean for each in measures], [each.std or 0 for each in measures] if is_of_several else None


def _panels(
    table: ResultTable, width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure with the table's title and labels, and its axes, row by row."""
    lines = [line for text in (table.title, *table.labels) for line in textwrap.wrap(text, int(width * 10))]
    figure = figure_of_size(width, height + 0.22 * (len(lines) - 1))
    figure.suptitle("\n".join(lines), fontsize=11, color="#A00000" if table.labels else INK)
    return figure, list(np.ravel(figure.subplots(rows, columns)))


def _legend(figure: Figure, learners: Any, paper: bool = True) -> None:
    styles = [STYLES[learner] for learner in learners]
    handles = [Line2D([], [], color=color, marker=marker, markersize=7, label=name) for color, marker, name in styles]
    handles += [Line2D([], [], **HOLLOW, label="paper")] * paper
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _by(table: ResultTable, name: str) -> dict[Any, list[Row]]:
    """The rows by one of their conditions, in order."""
    values = dict.fromkeys(row.condition[name] for row in table.rows)
    return {value: [row for row in table.rows if row.condition[name] == value] for value in values}


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


FIGURES = {"table1": _table1, "table2": _table2, "table3": _table3, "figure1": _figure1, "descriptors": _descriptors}


def draw(table: ResultTable) -> bytes:
    """The picture of a table, by its name, as a PNG file."""
    return png(FIGURES[table.name](table))
