"""The command line, from arguments to files and exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from utils.commands import fails
from utils.idx_files import write_folder

import gem_fast.paper.reports
from gem_fast import metrics
from gem_fast.paper.cli import main
from gem_fast.paper.cli.run import Kinds, Measuring, Resuming
from gem_fast.paper.errors import InputError, flag
from gem_fast.paper.experiments import training_run
from gem_fast.paper.learners import LEARNERS, PRESETS, LearnerName
from gem_fast.paper.learners.gem import Gem
from gem_fast.paper.streams import STREAMS, StreamName
from gem_fast.paper.streams.config import STREAM_CONFIGS


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    write_folder(folder)
    return folder


@pytest.fixture
def small(data):
    """Arguments of a run that takes a moment."""
    return ["run", "--learner", "single", "--data", str(data), "--tasks", "3", "--samples-per-task", "20"]


def result_of(arguments, out):
    assert main([*arguments, "--out", str(out)]) == 0
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize("stream", ["rotations", "permutations"])
@pytest.mark.parametrize("learner", LEARNERS)
def test_a_run_from_start_to_end(capsys, tmp_path, small, stream, learner):
    out = tmp_path / "new" / "out"
    arguments = [*small, "--stream", stream, "--learner", learner, "--eval-every", "1", "--seed", "3", "--epochs", "2"]
    result = result_of(arguments, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["result.json", "r_matrix.png", "first_task.png", "curves.png"]
    )
    keys = ["acc", "bwt", "fwt", "zero_shot", "R", "baseline", "seconds", "curves", "config", "versions"]
    assert list(result) == keys
    assert result["acc"] == metrics.acc(result["R"])
    assert result["bwt"] == metrics.bwt(result["R"])
    assert result["fwt"] == metrics.fwt(result["R"], result["baseline"])
    curves = result["curves"]
    unseen = metrics.zero_shot(curves["accuracy"], curves["task"]).mean()
    assert result["zero_shot"] == (None if learner == "joint" else unseen)
    assert list(result["seconds"]) == ["train", "eval"]
    assert len(result["curves"]["batch"]) == 3 * 2 * 2
    np.testing.assert_array_equal(metrics.r_matrix(result["curves"]["accuracy"], result["curves"]["task"]), result["R"])
    expected = {"stream": stream, "learner": learner, "tasks": 3, "seed": 3, "epochs": 2, "eval_every": 1}
    expected |= PRESETS[stream, learner]
    assert expected.items() <= result["config"].items()
    printed = capsys.readouterr()
    assert f"ACC {result['acc']:.4f}   BWT {result['bwt']:+.4f}   FWT {result['fwt']:+.4f}" in printed.out
    table = [line.split() for line in printed.out.splitlines()]
    assert ["untrained", *(str(round(100 * a)) for a in result["baseline"])] in table
    for task, row in enumerate(result["R"], start=1):
        assert ["task", str(task), *(str(round(100 * a)) for a in row)] in table
    assert printed.err.count("\n") == 3  # one line per task where stderr is no terminal


def test_the_seed_decides(tmp_path, small):
    runs = [result_of([*small, "--seed", seed], tmp_path / "out") for seed in ("0", "0", "1")]
    curves = [run["curves"] for run in runs]
    assert curves[0] == curves[1] != curves[2]


def test_tasks_in_another_order_that_come_back(capsys, tmp_path, small):
    results = [
        result_of([*small, "--lr", "0.3", *more.split()], tmp_path / "out")
        for more in ("", "--shuffle-tasks", "--shuffle-tasks --rounds 2 --batch-size 5")
    ]
    assert results[0]["R"] != results[1]["R"]
    assert [result["config"]["shuffle_tasks"] for result in results] == [False, True, True]
    assert results[2]["curves"]["task"] == [0, 0, 1, 1, 2, 2] * 2
    assert results[2]["curves"]["batch"] == list(range(1, 13))
    assert capsys.readouterr().err.splitlines()[-1].startswith("task 3/3 learned, accuracy ")


def test_the_table_of_20_tasks_fits_a_terminal(capsys, data):
    assert main(["run", "--learner", "single", "--data", str(data), "--samples-per-task", "10"]) == 0
    table = capsys.readouterr().out.split("\n\n")[1:]
    assert max(len(line) for part in table for line in part.splitlines()) <= 100


def test_the_module_runs_as_a_program(tmp_path, small):
    finished = subprocess.run(
        [sys.executable, "-m", "gem_fast", *small, "--tasks", "0"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert "--tasks must be a whole number from 1 to 2147483647, got 0" in finished.stderr


def test_the_console_command(small):
    """The entry point's function, called as the script that pip writes calls it."""
    scripts = re.search(
        r'^gem-fast = "(.+):(.+)"$', (Path(__file__).parents[2] / "pyproject.toml").read_text(), flags=re.MULTILINE
    )
    code = f"import sys; sys.argv[0] = '/somewhere/bin/gem-fast'; from {scripts[1]} import {scripts[2]} as main; "
    finished = subprocess.run(
        [sys.executable, "-c", f"{code} sys.exit(main())", *small, "--rounds", "21"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 2
    assert finished.stderr.startswith("gem-fast: --rounds must be at most 20")


@pytest.mark.parametrize(("stream", "learner"), [("rotations", "gem"), ("split", "ewc"), ("cifar100", "icarl")])
def test_help_explains_every_option(capsys, stream, learner):
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--stream", stream, "--learner", learner, "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    names = [
        name
        for part in (Kinds, STREAM_CONFIGS[stream], LEARNERS[learner].Config, Measuring, Resuming)
        for name in part.names()
    ]
    assert set(re.findall(r"(--[a-z-]+)[, ]", text.partition("main options")[2])) >= {flag(name) for name in names}
    assert text.count("(default: ") == len(names)
    for name, value in PRESETS[stream, learner].items():
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        assert re.search(rf"{flag(name)}[, ].*?\(default: (.*?)\)", text)[1] == shown


def test_the_names_on_the_command_line_are_those_registered():
    assert get_args(StreamName) == tuple(STREAMS) == tuple(STREAM_CONFIGS)
    assert get_args(LearnerName) == tuple(LEARNERS)
    assert get_args(get_type_hints(Gem.Config)["memory_policy"]) == tuple(gem_fast.MEMORY_POLICIES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks 0", "--tasks must be a whole number from 1 to 2147483647, got 0"),
        ("--tasks 2.5", "--tasks must be a whole number, got '2.5'"),
        ("--batch-size 0", "--batch-size must be"),
        ("--epochs -1", "--epochs must be"),
        ("--samples-per-task 0", "--samples-per-task must be"),
        ("--samples-per-task 61", "--samples-per-task must be at most 60"),
        ("--eval-every 0", "--eval-every must be"),
        ("--seed -1", "--seed must be a whole number from 0 to 9223372036854775807, got -1"),
        ("--seed 9223372036854775808", "--seed must be"),
        ("--batch-size 99999999999", "--batch-size must be a whole number from 1 to 2147483647, got 99999999999"),
        (f"--batch-size {'9' * 5000}", "--batch-size must be"),
        ("--lr 1e300", "--lr must be a number above 0 and at most 1e+30, got 1e+300"),
        ("--lr -0.1", "--lr must be a number above 0 and at most 1e+30, got -0.1"),
        ("--lr 0", "--lr must be"),
        ("--lr inf", "--lr must be"),
        ("--lr fast", "--lr must be"),
        ("--learner gem --memory-per-task 0", "--memory-per-task must be"),
        ("--learner gem --margin nan", "--margin must be a number from 0 to 1e+30, got nan"),
        ("--learner gem --ridge -1", "--ridge must be"),
        ("--margin 0.5", "--margin is not an option of the learner single"),
        ("--memory-per-task 9", "--memory-per-task is not an option of the learner single"),
        ("--memory 9", "--memory is not an option of the learner single"),
        ("--learner gem --no-clone", "--clone is not an option of the learner gem"),
        ("--learner gem --strength 1", "--strength is not an option of the learner gem"),
        ("--learner ewc --strength -1", "--strength must be a number from 0 to 1e+30, got -1"),
        ("--learner icarl --memory 0", "--memory must be a whole number from 1 to 2147483647, got 0"),
        ("--learner icarl --memory 11", "--memory must be at least one exemplar of each class, 12 here, got 11"),
        ("--learner sgd", "for argument '--learner'. Expected one of"),
        ("--stream shuffles", "for argument '--stream'. Expected one of"),
        ("--device nonsense", "--device must be a device torch can use here, got 'nonsense'"),
        ("--device meta", "--device must be a device torch can use here, got 'meta'"),
        ("--data nowhere", "--data must be mnist-5k, mnist,"),
        ("--rounds 0", "--rounds must be a whole number from 1 to 2147483647, got 0"),
        ("--rounds 21", "--rounds must be at most 20, the training examples of task 1, got 21"),
        ("--head shared", "--head is not an option of the stream rotations"),
        ("--class-order random", "--class-order is not an option of the stream rotations"),
        ("--task 3", "unrecognized arguments: --task 3"),
    ],
)
def test_bad_arguments(capsys, small, arguments, message):
    assert message in fails(capsys, [*small, *arguments.split()])


@pytest.mark.parametrize("width", range(96, 106, 2))
def test_a_sign_stays_where_a_line_of_the_error_begins_with_it(capsys, monkeypatch, small, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert "1e+30, got -1.0 (see" in fails(capsys, [*small, "--learner", "ewc", "--strength", "-1"])


def test_a_learner_that_is_not_for_the_stream():
    with pytest.raises(InputError, match="--learner multimodal is not for the stream cifar100"):
        training_run.hyper_parameters("cifar100", "multimodal", {})


def test_no_command(capsys):
    assert "Expected one of {run, table1, table2, table3, figure1, descriptors, grid}." in fails(capsys, [])


def test_out_must_be_a_folder_that_can_be_written_to(capsys, tmp_path, small):
    file = tmp_path / "file"
    file.write_text("kept")
    assert "it is a file" in fails(capsys, [*small, "--out", str(file)])
    assert "--out must be a folder" in fails(capsys, [*small, "--out", str(file / "below")])
    assert file.read_text() == "kept"


def test_a_broken_data_file(capsys, data, small):
    (data / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    assert "t10k-images-idx3-ubyte is truncated" in fails(capsys, small)


@pytest.mark.parametrize(
    ("module", "user", "purpose"), [("matplotlib", "run_plots", "--out"), ("tqdm", "progress", "the progress bar")]
)
def test_a_missing_extra_is_told_before_training(capsys, monkeypatch, tmp_path, small, module, user, purpose):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"gem_fast.paper.reports.{user}", raising=False)
    monkeypatch.delattr(gem_fast.paper.reports, user, raising=False)
    message = fails(capsys, [*small, "--out", str(tmp_path / "out")])
    assert f"{purpose} needs a package that cannot be imported here" in message
    assert "pip install 'gem_fast[demo]'" in message
    assert not (tmp_path / "out").exists()


def test_a_command_line_without_its_library(capsys, monkeypatch, small):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert "the command line needs a package that cannot be imported here" in fails(capsys, small)


def test_importing_the_library_imports_nothing_of_the_paper():
    code = (
        "import sys, gem_fast; gem_fast.GEM; print([name for name in sys.modules if 'paper' in name or 'tyro' in name])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_run_that_diverges_leaves_no_files(capsys, tmp_path, small):
    assert main([*small, "--lr", "1e30", "--epochs", "3", "--out", str(tmp_path / "out")]) == 2
    assert "training diverged" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ("--learner single --lr 1e30", "--lr"),
        ("--learner gem --margin 1e10", "--margin"),
        ("--learner gem --margin 1e20", "--margin"),
        ("--learner gem --margin 1e30", "--margin"),
        ("--learner gem --margin 1e20 --lr 1e20", "--lr or --margin"),
        ("--learner gem_pure_python --margin 1e20", "--margin"),
        ("--learner agem --margin 1e20 --lr 0.001", "--margin"),
        ("--learner ewc --strength 1e30", "--strength"),
        ("--learner icarl --strength 1e29", "--strength"),
    ],
)
def test_what_made_a_run_diverge_is_named(capsys, small, options, cure):
    assert main([*small, "--epochs", "4", *options.split()]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("python -m gem_fast: training diverged: ")
    assert message.endswith(f"; try a smaller {cure}")


def test_ctrl_c(capsys, monkeypatch, tmp_path, small):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "learn_stream", interrupted)
    assert main([*small, "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "python -m gem_fast: interrupted\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_files_are_written_whole_or_not_at_all(capsys, tmp_path, small):
    out = tmp_path / "out"
    (out / "result.json").mkdir(parents=True)
    assert main([*small, "--out", str(out)]) == 2
    assert "result.json cannot be written" in capsys.readouterr().err
    names = sorted(path.name for path in out.iterdir())
    assert names == ["curves.png", "first_task.png", "r_matrix.png", "result.json"]
