"""What is too large for the machine is refused before anything is allocated."""

import re
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from utils.commands import fails
from utils.idx_files import write_folder

from gem_fast.paper.data import ImageData
from gem_fast.paper.errors import InputError
from gem_fast.paper.experiments import training_run
from gem_fast.paper.experiments.training_run import check_footprint, configuration
from gem_fast.paper.learners import PRESETS

DIGITS = ImageData("digits", *(torch.zeros(shape, dtype=torch.uint8) for shape in ((100, 28, 28), (100,)) * 2))


@pytest.fixture
def data(tmp_path):
    write_folder(tmp_path / "data")
    return ["--data", str(tmp_path / "data")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("run --tasks 2000000000", "--tasks 2000000000 needs about"),
        ("run --tasks 2147483647 --learner single --stream permutations", "--tasks 2147483647 needs about"),
        ("run --tasks 2000000 --learner multimodal", "--tasks 2000000 needs about"),
        ("run --tasks 2000000 --learner single --descriptor one-hot", "--tasks 2000000 needs about"),
        ("run --rounds 60 --tasks 9000000 --learner single", "--tasks 9000000 needs about"),
        (
            "run --memory-per-task 2000000000 --samples-per-task 60 --epochs 2000000000 --batch-size 2000000000",
            "--memory-per-task 2000000000 needs about 5.12 TB of memory, and cpu has",
        ),
    ],
)
def test_too_large_for_any_machine(capsys, data, options, message):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in fails(capsys, [*options.split(), *data])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # in kB


def test_a_grid_is_refused_before_its_first_run(capsys, monkeypatch, tmp_path, data):
    monkeypatch.setattr(training_run, "_available", lambda device: 15000)
    monkeypatch.setattr("gem_fast.paper.cli.grid.QUICK_SIZE", {"tasks": 3, "samples_per_task": 60})
    out = tmp_path / "out"
    message = fails(capsys, ["grid", "--quick", "--memory-per-task", "5", "60000", *data, "--out", str(out)])
    assert "--memory-per-task 60000 needs about 23 kB of memory, and cpu has 15 kB" in message
    assert list((out / "run_cache").iterdir()) == []


@given(
    tasks=st.integers(1, 2**31 - 1),
    samples=st.integers(1, 2**31 - 1),
    memory=st.integers(1, 2**31 - 1),
    epochs=st.integers(1, 2**31 - 1),
    pair=st.sampled_from(sorted(PRESETS)),
)
def test_the_estimate_never_fails(tasks, samples, memory, epochs, pair):
    stream, learner = pair
    options = {"memory_per_task": memory} if "memory_per_task" in PRESETS[pair] else {}
    config = configuration(stream, learner, tasks=tasks, samples_per_task=samples, epochs=epochs, **options)
    sentence = ""
    try:
        check_footprint(config, DIGITS)
    except InputError as error:
        sentence = str(error)
    assert re.fullmatch(r"(--\S+ \d+ needs about [\d.e+]+ [kMGTP]?B of memory, and cpu has \d+.*)?", sentence)
    assert sentence or tasks < 10**8
    assert not sentence or tasks > 1000 or epochs > 100


def test_the_published_settings_fit():
    for stream, learner in PRESETS:
        if stream != "cifar100":
            check_footprint(configuration(stream, learner), DIGITS)
