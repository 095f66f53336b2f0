"""The pictures: drawn for any number of tasks, without a warning, readable as PNG."""

import io

import numpy as np
import pytest
from PIL import Image

from gem_fast import metrics
from gem_fast.paper.experiments.protocol import Record
from gem_fast.paper.reports import run_plots
from gem_fast.paper.reports.run_plots import draw_all


def make_record(n_tasks, rows_per_task=2):
    rng = np.random.default_rng(0)
    rows = n_tasks * rows_per_task
    return Record(
        baseline=rng.random(n_tasks),
        accuracy=rng.random((rows, n_tasks)),
        batch=10 * np.arange(1, rows + 1),
        task=np.repeat(np.arange(n_tasks), rows_per_task),
        train_seconds=1.0,
        eval_seconds=2.0,
    )


@pytest.mark.parametrize("n_tasks", [1, 2, 20, 70])
def test_pictures(n_tasks):
    files = draw_all(make_record(n_tasks), "a title")
    assert list(files) == ["r_matrix.png", "first_task.png", "curves.png"]
    for contents in files.values():
        with Image.open(io.BytesIO(contents)) as image:
            assert image.format == "PNG"
            assert min(image.size) >= 400
            assert max(image.size) <= 3000
            assert len(image.getcolors(maxcolors=2**24)) > 10


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn since, in the order r_matrix, first_task, curves."""
    drawn = []
    png = run_plots.png
    monkeypatch.setattr(run_plots, "png", lambda figure: drawn.append(figure) or png(figure))
    return drawn


def assert_line(line, x, y):
    np.testing.assert_allclose(line.get_xdata(), x)
    np.testing.assert_allclose(line.get_ydata(), y)


def assert_first_task(figure, record, x, tasks_learned):
    """The curve of the first task, and a marker at the end of each experience."""
    axes = figure.axes[0]
    curve, markers = axes.lines[-2:]
    accuracy = 100 * np.append(record.baseline[0], record.accuracy[:, 0])
    assert_line(curve, x, accuracy)
    assert_line(markers, np.arange(tasks_learned + 1), accuracy[np.isin(x, np.arange(tasks_learned + 1))])
    assert axes.get_xlim() == (0, tasks_learned)


def assert_means(figure, x, means, means_to_come):
    """Of the tasks that have begun, and of those that have not."""
    begun, to_come = [line for line in figure.axes[0].lines if line.get_label().startswith("mean")]
    assert_line(begun, x, means)
    assert_line(to_come, x[: len(means_to_come)], means_to_come)


def test_one_evaluation_per_task_is_enough(figures):
    record = make_record(3, rows_per_task=1)
    draw_all(record, "a title")
    _, first_task, curves = figures
    x = [0, 1, 2, 3]
    assert_first_task(first_task, record, x, tasks_learned=3)
    rows = 100 * np.vstack([record.baseline, record.accuracy])
    begun = [rows[0, :1].mean(), rows[1, :1].mean(), rows[2, :2].mean(), rows[3].mean()]
    assert_means(curves, x, begun, [rows[0].mean(), *(100 * metrics.zero_shot(record.accuracy, record.task))])


def test_tasks_that_come_back_and_differ_in_size(figures):
    rng = np.random.default_rng(0)
    batch = np.array([2, 4, 9, 11, 20, 24])  # the first task has two evaluations, the others one for each experience
    record = Record(rng.random(3), rng.random((6, 3)), batch, np.array([0, 0, 1, 2, 0, 1]), 1.0, 2.0)
    draw_all(record, "a title")
    _, first_task, curves = figures
    x = [0, 0.5, 1, 2, 3, 4, 5]
    assert_first_task(first_task, record, x, tasks_learned=5)
    rows = 100 * np.vstack([record.baseline, record.accuracy])
    begun = [1, 1, 1, 2, 3, 3, 3]
    means = [row[:n].mean() for row, n in zip(rows, begun, strict=True)]
    assert_means(curves, x, means, [rows[0].mean(), rows[1, 1:].mean(), rows[2, 1:].mean(), rows[3, 2]])


def test_the_same_record_gives_the_same_bytes():
    assert draw_all(make_record(3), "a title") == draw_all(make_record(3), "a title")
