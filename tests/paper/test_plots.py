"""The pictures: drawn for any number of tasks, without a warning, readable as PNG."""

import io

import numpy as np
import pytest
from PIL import Image

from gem_fast.paper.plots import draw_all
from gem_fast.paper.protocol import Record


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


def test_one_evaluation_per_task_is_enough():
    assert draw_all(make_record(3, rows_per_task=1), "a title")


def test_tasks_that_come_back_and_differ_in_size():
    rng = np.random.default_rng(0)
    batch = np.array([4, 9, 11, 20, 24])
    assert draw_all(Record(rng.random(3), rng.random((5, 3)), batch, np.array([0, 1, 2, 0, 1]), 1.0, 2.0), "a title")


def test_the_same_record_gives_the_same_bytes():
    assert draw_all(make_record(3), "a title") == draw_all(make_record(3), "a title")
