"""The three pictures of a run. Tasks count from 1, as in the paper."""

import io
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from gem_fast.paper.experiments.protocol import FloatArray, Record

INK = "#222222"
DOTS_PER_INCH = 150
# Perceptually uniform and safe for colour-blind readers.
COLORS = matplotlib.colormaps["viridis"]


def draw_all(record: Record, title: str) -> dict[str, bytes]:
    """The pictures of a run, as PNG files by name; `title`, their first line, says what was run."""
    return {
        "r_matrix.png": png(_r_matrix(record, title)),
        "first_task.png": png(_first_task(record, title)),
        "curves.png": png(_curves(record, title)),
    }


def _r_matrix(record: Record, title: str) -> Figure:
    """R as a heat map, with the accuracy of the untrained model as a row of its own above it."""
    n_tasks = len(record.baseline)
    rows = 100 * np.vstack([record.baseline, record.R])
    with_numbers = n_tasks <= 30
    cell = 0.4 if with_numbers else 0.12  # inches
    figure = figure_of_size(2.4 + max(3.0, cell * n_tasks), 1.5 + max(2.0, cell * (n_tasks + 1)))
    axes = figure.add_subplot(xlabel="tested on task", ylabel="after learning task")
    image = axes.imshow(rows, cmap=COLORS, vmin=0, vmax=100, aspect="auto")
    if with_numbers:
        for (row, column), value in np.ndenumerate(rows):
            color = "white" if value < 55 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
        for task in range(n_tasks):
            axes.add_patch(Rectangle((task - 0.5, task + 0.5), 1, 1, fill=False, edgecolor="white", linewidth=1.2))
    axes.axhline(0.5, color="white", linewidth=6)  # sets the untrained model apart from R
    ticks = range(0, n_tasks, _tick_step(n_tasks))
    numbers = [str(task + 1) for task in ticks]
    axes.set_xticks(ticks, numbers)
    axes.set_yticks([0, *(task + 1 for task in ticks)], ["untrained", *numbers])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="test accuracy (%)", aspect=30).outline.set_visible(False)
    measures = f"ACC {100 * record.acc:.1f} %   BWT {100 * record.bwt:+.1f}   FWT {100 * record.fwt:+.1f} points"
    figure.suptitle(f"{title}\n{measures}", fontsize=11)
    return figure


def _first_task(record: Record, title: str) -> Figure:
    """Accuracy of the first task along the stream, as in Figure 1 of the paper."""
    x, accuracy, ends = _along_stream(record)
    figure = figure_of_size(8, 4)
    axes = _stream_axes(figure, int(x[-1]))
    axes.plot(x, accuracy[:, 0], color=COLORS(0.25), linewidth=1.8)
    axes.plot(x[ends], accuracy[ends, 0], "o", color=COLORS(0.25), markersize=5, clip_on=False)
    last = x[-1], accuracy[-1, 0]
    axes.annotate(f"{last[1]:.1f} %", last, xytext=(6, 0), textcoords="offset points", va="center")
    figure.suptitle(f"Accuracy of the first task along the stream\n{title}", fontsize=11)
    return figure


def _curves(record: Record, title: str) -> Figure:
    """The accuracy of every task along the stream: a faint line before it is learned, a strong one from there on."""
    n_tasks = len(record.baseline)
    x, accuracy, _ = _along_stream(record)
    figure = figure_of_size(11, 5.5)
    axes = _stream_axes(figure, int(x[-1]))
    palette = ListedColormap(COLORS(np.linspace(0, 0.92, n_tasks)))  # the yellow end of the colours fades on white
    for task in range(n_tasks):
        before, after = x <= task, x >= task
        axes.plot(x[before], accuracy[before, task], color=palette(task), linewidth=0.8, alpha=0.4)
        axes.plot(x[after], accuracy[after, task], color=palette(task), linewidth=1.5)
    begun = np.append(0, np.maximum.accumulate(record.task) + 1)
    # Before the first task has begun, its accuracy stands for the mean.
    mean = [row[: max(1, n)].mean() for row, n in zip(accuracy, begun, strict=True)]
    to_come = [row[n:].mean() for row, n in zip(accuracy, begun, strict=True) if n < n_tasks]
    dotted: dict[str, Any] = {"color": INK, "linewidth": 2, "linestyle": (0, (1, 1))}
    legend = [
        *axes.plot(x, mean, color=INK, linewidth=2.6, linestyle=(0, (3, 1)), label="mean over the tasks begun"),
        *axes.plot(x[: len(to_come)], to_come, **dotted, label="mean over those to come"),
        Line2D([], [], color=palette(0), linewidth=1.5, label="a task from when it is learned"),
        Line2D([], [], color=palette(0), linewidth=0.8, alpha=0.4, label="the same task before"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=4, frameon=False)
    scale = ScalarMappable(Normalize(0.5, n_tasks + 0.5), palette)
    ticks = range(1, n_tasks + 1, _tick_step(n_tasks))
    figure.colorbar(scale, ax=axes, label="task", ticks=ticks, aspect=40, pad=0.01).outline.set_visible(False)
    figure.suptitle(f"Learning curves of all tasks\n{title}", fontsize=11)
    return figure


def _along_stream(record: Record) -> tuple[FloatArray, FloatArray, npt.NDArray[np.bool_]]:
    """The untrained model and each evaluation: its place, in tasks learned, accuracies in %, whether a task ends there.

    A task that comes back counts again.
    """
    ends = np.append(True, record.task != np.append(record.task[1:], -1))
    batch = np.append(0, record.batch)
    x = np.interp(batch, batch[ends], np.arange(ends.sum()))  # tasks have different numbers of mini-batches
    return x, 100 * np.vstack([record.baseline, record.accuracy]), ends


def _stream_axes(figure: Figure, n_tasks: int) -> Axes:
    axes = figure.add_subplot(xlim=(0, n_tasks), ylim=(0, 100), xlabel="tasks learned", ylabel="test accuracy (%)")
    axes.set_xticks(range(0, n_tasks + 1, _tick_step(n_tasks)))
    for boundary in range(1, n_tasks):
        axes.axvline(boundary, color=INK, alpha=0.12, linewidth=0.8)
    light_axes(axes, "y")
    return axes


def light_axes(axes: Axes, axis: Literal["x", "y"]) -> None:
    """Faint lines across one axis, behind what is drawn, and no frame at the top and the right."""
    axes.grid(axis=axis, color=INK, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _tick_step(n_tasks: int) -> int:
    return -(-n_tasks // 30)


def figure_of_size(width: float, height: float) -> Figure:
    """An empty figure; the sizes are in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()
