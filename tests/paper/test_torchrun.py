"""The subcommand run in two processes that torchrun starts."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from torch.distributed import HashStore
from utils.idx_files import write_folder

from gem_fast.paper.cli import main
from gem_fast.paper.errors import InputError, flag
from gem_fast.paper.experiments.torchrun import Processes, share


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


@pytest.mark.parametrize(
    "learner",
    [
        ["single"],
        ["gem", "--memory-per-task", "6", "--epochs", "2", "--rounds", "2"],
        ["gem", "--memory-per-task", "6", "--descriptor", "angle"],
    ],
)
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


def test_a_learner_that_cannot_be_shared_is_refused_in_one_line(data):
    done = torchrun(*data, "--learner", "ewc", restarts=0)
    assert done.returncode != 0
    sentence = "--learner ewc trains in one process only, got 2 processes of torchrun, which single, gem, agem can use"
    assert [line for line in done.stderr.splitlines() if "gem_fast: " in line] == [f"python -m gem_fast: {sentence}"]


@pytest.mark.parametrize("name", ["memory_per_task", "memory_batch"])
def test_the_processes_share_out_what_counts_examples(name):
    two = Processes(2, 1)
    assert share(two, "gem", {name: 256, "lr": 0.1}) == {name: 128, "lr": 0.1}
    assert share(two, "gem", {name: None}) == {name: None}
    sentence = f"{flag(name)} must be a multiple of 2, the number of processes, got 5"
    with pytest.raises(InputError, match=re.escape(sentence)):
        share(two, "gem", {name: 5})


def test_one_process_of_torchrun_is_the_plain_run(data, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["run", *data, "--out", str(tmp_path / "out"), "--learner", "ewc"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["table3"], "only the command run can use several processes, got 2 of torchrun"),
        (["run", "--tasks", "many"], "--tasks must be a whole number, got 'many'"),
    ],
)
def test_the_first_process_to_fail_says_why(arguments, sentence, monkeypatch, capsys):
    store = HashStore()
    monkeypatch.setattr("gem_fast.paper.experiments.torchrun._store", lambda: store)
    for rank, said in ((1, 1), (0, 0)):
        for name, value in {"RANK": str(rank), "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        assert exit_code(arguments) == 2
        assert capsys.readouterr().err.count(sentence) == said


def exit_code(arguments):
    try:
        return main(arguments)
    except SystemExit as error:
        return error.code
