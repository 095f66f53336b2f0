"""The grid search: every combination once, the best first, and nothing computed twice."""

import json

import pytest
from utils.commands import check_markdown, fails
from utils.idx_files import write_folder

from gem_fast.paper.cli import grid, main
from gem_fast.paper.experiments import run_cache
from gem_fast.paper.experiments.training_run import TrainingRun
from gem_fast.paper.learners import LEARNERS, PRESETS


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(grid, "QUICK_SIZE", {"tasks": 2, "samples_per_task": 20})
    write_folder(tmp_path / "data")
    return ["grid", "--quick", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]


@pytest.fixture
def computed(monkeypatch):
    configs = []

    def training_run(config):
        configs.append(config)
        return TrainingRun(config)

    monkeypatch.setattr(run_cache, "TrainingRun", training_run)
    return configs


def result_of(tmp_path, learner):
    return json.loads((tmp_path / "out" / f"grid-rotations-{learner}.json").read_text())


def test_every_combination_once_and_the_best_first(tiny, tmp_path, capsys, computed):
    more = ["--learner", "gem", "--lr", "0.01", "0.1", "--margin", "0", "1", "--memory-per-task", "3", "5"]
    assert main([*tiny, *more]) == 0
    printed = capsys.readouterr().out
    points = {(config["lr"], config["margin"], config["memory_per_task"]) for config in computed}
    assert len(points) == len(computed) == 8
    result = result_of(tmp_path, "gem")
    assert result["quick"] is True
    assert {"seeds", "machine", "labels", "title"} <= set(result)
    accuracies = [row["ours"]["acc"]["mean"] for row in result["rows"]]
    assert accuracies == sorted(accuracies, reverse=True)
    markdown = (tmp_path / "out" / "grid-rotations-gem.md").read_text()
    for text in (printed, markdown):
        assert "QUICK: " in text
    rows = check_markdown(markdown)
    assert rows[0] == ["lr", "memory per task", "margin", "ACC", "BWT", "FWT"]
    assert len(rows) == 10


def test_one_more_value_computes_only_what_is_new(tiny, computed):
    assert main([*tiny, "--learner", "single", "--lr", "0.01", "0.1"]) == 0
    assert main([*tiny, "--learner", "single", "--lr", "0.1", "0.3", "0.01"]) == 0
    assert [config["lr"] for config in computed] == [0.01, 0.1, 0.3]


def test_interrupted_then_resumed_gives_the_same_files(tiny, tmp_path, monkeypatch, capsys):
    more = ["--learner", "single", "ewc", "--lr", "0.01", "0.1", "--strength", "1", "--memory-per-task", "4"]
    assert main([*tiny, *more]) == 0
    whole = [result_of(tmp_path, learner) for learner in ("single", "ewc")]
    made = []

    def training_run(config):
        made.append(config)
        if len(made) == 4:
            raise KeyboardInterrupt
        return TrainingRun(config)

    monkeypatch.setattr(run_cache, "TrainingRun", training_run)
    other = [str(tmp_path / "other") if option == str(tmp_path / "out") else option for option in tiny]
    assert main([*other, *more]) == 130
    assert "1 of 2 runs are finished" in capsys.readouterr().err
    assert main([*other, *more]) == 0
    assert len(made) == 5
    for learner, result in zip(("single", "ewc"), whole, strict=True):
        assert json.loads((tmp_path / "other" / f"grid-rotations-{learner}.json").read_text()) == result


def test_what_diverges_comes_last_and_stops_nothing(tiny, tmp_path, capsys):
    assert main([*tiny, "--learner", "single", "--lr", "1e30", "0.1"]) == 0
    result = result_of(tmp_path, "single")
    assert [row["lr"] for row in result["rows"]] == [0.1, 1e30]
    assert result["rows"][1]["ours"] == {}
    assert "diverged" in capsys.readouterr().out
    assert main([*tiny, "--learner", "single", "--lr", "1e30"]) == 0
    assert "diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--learner single --margin 1", "--margin is not an option of single"),
        ("--learner nobody", "for argument '--learner'. Expected one of"),
        ("--lr 0", "--lr must be a number above 0 and at most 1e+30, got 0.0"),
        ("--memory-per-task 1.5", "--memory-per-task must be a whole number"),
        ("--stream cifar100 --learner multimodal", "--learner multimodal is not for the stream cifar100"),
        ("--data nowhere", "--data must be"),
    ],
)
def test_bad_options_give_one_sentence(tiny, capsys, arguments, message):
    assert message in fails(capsys, [*tiny, *arguments.split()])


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("stream", ["rotations", "permutations", "cifar100"])
def test_the_published_values_are_in_the_grid(stream, learner):
    preset = PRESETS.get((stream, learner), {})
    for name, values in grid.GRID.items():
        assert name not in preset or preset[name] in values
