"""The subcommand run in two processes that torchrun starts."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from utils.idx_files import write_folder

from gem_fast.paper.cli import main


@pytest.fixture
def data(tmp_path):
    """Three tasks of 15 examples in mini-batches of 7: the parts are 4 and 3, and the last one is 1 and 0."""
    write_folder(tmp_path / "data", n_test=300)
    return ["--data", str(tmp_path / "data"), "--tasks", "3", "--samples-per-task", "15", "--batch-size", "7"]


def torchrun(*arguments, restarts=2):
    """What two processes did; gloo now and then fails to connect them, and torchrun then starts them again."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    return subprocess.run(
        [sys.executable, "-m", *launch, "-m", "gem_fast", "run", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("learner", [["single"], ["gem", "--memory-per-task", "6", "--epochs", "2", "--rounds", "2"]])
def test_two_processes_do_the_run_of_one(tmp_path, data, learner):
    arguments = [*data, "--lr", "0.5", "--learner", *learner, "--out"]
    assert main(["run", *arguments, str(tmp_path / "one")]) == 0
    done = torchrun(*arguments, str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("learned, accuracy") == (6 if "--rounds" in learner else 3)
    assert done.stdout.count("ACC") == done.stdout.count("written:") == 1
    assert len(list((tmp_path / "two").iterdir())) == 4
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert two["config"] == one["config"] | {"processes": 2}
    assert one["R"] != [one["R"][0]] * 3  # it learned something
    for name in ("baseline", "R"):
        np.testing.assert_allclose(two[name], one[name], atol=0.004)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--learner", "ewc"], "--learner ewc trains in one process only, got 2 processes of torchrun"),
        (["--learner", "gem", "--memory-per-task", "5"], "--memory-per-task must be a multiple of 2"),
    ],
)
def test_what_cannot_be_shared_is_refused_once(tmp_path, data, arguments, sentence):
    done = torchrun(*data, *arguments, restarts=0)
    assert done.returncode != 0
    assert done.stderr.count("python -m gem_fast: ") == done.stderr.count(sentence) == 1
