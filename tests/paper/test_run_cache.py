"""The run cache: no run is computed twice, an interrupted one goes on, and damaged or foreign files are not used."""

import json
from pathlib import Path
from typing import Any

import pytest
from utils.idx_files import write_folder

from gem_fast.paper.errors import InputError
from gem_fast.paper.experiments import run_cache
from gem_fast.paper.experiments.checkpoint import Checkpoints
from gem_fast.paper.experiments.run_cache import read_run, run_cached, run_name
from gem_fast.paper.experiments.training_run import RunConfig, TrainingRun, configuration
from gem_fast.paper.learners.gem import Gem


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run of 60 mini-batches."""
    write_folder(tmp_path / "data")
    return configuration(
        stream="permutations",
        learner="gem",
        data=str(tmp_path / "data"),
        tasks=3,
        samples_per_task=20,
        batch_size=1,
        memory_per_task=5,
    )


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations of the runs made since."""
    configs = []

    def training_run(config: RunConfig) -> TrainingRun:
        configs.append(config)
        return TrainingRun(config)

    monkeypatch.setattr(run_cache, "TrainingRun", training_run)
    return configs


def contents(folder: Path) -> dict[str, Any]:
    """All files of a folder, without what differs from run to run."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = json.loads(path.read_text())
        files[path.name].pop("seconds")
    return files


def test_names_tell_configurations_apart(config):
    others = [config | {name: value} for name, value in [("seed", 1), ("lr", 0.2), ("epochs", 2), ("tasks", 4)]]
    names = {run_name(other) for other in [config, *others]}
    assert len(names) == 5
    assert run_name(config) == run_name(dict(reversed(config.items())))
    assert run_name(config).startswith("permutations-gem-seed0-")


def test_a_finished_run_is_not_computed_again(tmp_path, config, computed):
    out = tmp_path / "out"
    first = run_cached(out, [config])
    again = run_cached(out, [config, config | {"seed": 1}, config])
    assert computed == [config, config | {"seed": 1}]
    assert [record.acc for record in again] == [first[0].acc, again[1].acc, first[0].acc]
    assert [path.name for path in sorted(out.iterdir())] == sorted(f"{run_name(c)}.json" for c in computed)


def test_a_cached_run_is_the_training_run(tmp_path, config):
    (record,) = run_cached(tmp_path / "out", [config])
    plain = TrainingRun(config).run()
    assert record.R.tolist() == plain.R.tolist()
    assert read_run(tmp_path / "out" / f"{run_name(config)}.json", config).R.tolist() == plain.R.tolist()


def test_progress_is_told(tmp_path, config, capsys):
    run_cached(tmp_path / "out", [config, config | {"seed": 1}])
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(": accuracy")[0] for line in told] == [
        "run 1 of 2: gem on permutations of data, seed 0",
        "run 2 of 2: gem on permutations of data, seed 1",
    ]
    run_cached(tmp_path / "out", [config, config | {"seed": 1}])
    assert capsys.readouterr().err.endswith(f"2 of 2 runs are finished already in {tmp_path / 'out'}\n")


@pytest.mark.parametrize("batch", [1, 30, 59, 75])
def test_interrupted_then_resumed_gives_the_same_files(tmp_path, config, monkeypatch, batch):
    configs = [config, config | {"seed": 1}]
    run_cached(tmp_path / "whole", configs)
    observe, calls = Gem.observe, []

    def interrupted(self, x, y, task):
        calls.append(task)
        if len(calls) == batch + 1:
            raise KeyboardInterrupt
        observe(self, x, y, task)

    monkeypatch.setattr(Gem, "observe", interrupted)
    finished = batch // 60
    with pytest.raises(KeyboardInterrupt, match=f"^{finished} of 2 runs are finished in .*; the same command goes on"):
        run_cached(tmp_path / "out", configs)
    saved = max(int(path.stem.split("-")[1]) for path in (tmp_path / "out").glob("*.checkpoints/*.gem"))
    calls[:] = [0] * 1000  # no second interruption
    run_cached(tmp_path / "out", configs)
    assert len(calls) - 1000 == 120 - 60 * finished - saved
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text[:-20], "is damaged, or not the result of a run: JSONDecodeError"),
        (lambda text: "\xff" + text, "is damaged, or not the result of a run: UnicodeDecodeError"),
        (lambda text: "[" * 100_000, "is damaged, or not the result of a run: RecursionError"),
        (lambda text: "[]", "is damaged, or not the result of a run: TypeError"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "but of another configuration"),
        (lambda text: text.replace('"curves"', '"curve"'), "KeyError"),
        (lambda text: text.replace('"accuracy": [', '"accuracy": [[0.5], '), "is damaged"),
    ],
)
def test_a_damaged_or_foreign_file_is_told_and_computed_anew(tmp_path, config, computed, capsys, damage, sentence):
    run_cached(tmp_path, [config])
    path = tmp_path / f"{run_name(config)}.json"
    sound = path.read_text()
    path.write_text(damage(sound), encoding="latin-1")
    with pytest.raises(InputError, match=sentence):
        read_run(path, config)
    capsys.readouterr()
    run_cached(tmp_path, [config])
    told = capsys.readouterr().err.splitlines()[0]
    assert sentence in told
    assert told.endswith("; it is computed anew")
    assert computed == [config, config]
    assert json.loads(path.read_text())["R"] == json.loads(sound)["R"]


def test_damaged_checkpoints_begin_the_run_anew(tmp_path, config, monkeypatch, capsys):
    (whole,) = run_cached(tmp_path / "whole", [config])

    def interrupted(self, x, y, task):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        observe = Gem.observe
        patch.setattr(Gem, "observe", lambda *args: interrupted(*args) if args[3] == 2 else observe(*args))
        with pytest.raises(KeyboardInterrupt):
            run_cached(tmp_path / "out", [config])
    for path in Checkpoints(tmp_path / "out" / f"{run_name(config)}.checkpoints").paths():
        path.write_bytes(path.read_bytes()[:-1])
    (record,) = run_cached(tmp_path / "out", [config])
    assert "; the run starts from its beginning" in capsys.readouterr().err
    assert record.R.tolist() == whole.R.tolist()


def test_a_run_that_diverges(tmp_path, config, computed):
    bad = config | {"learner": "single", "lr": 1e30}
    for name in ("memory_per_task", "margin", "ridge"):
        del bad[name]
    for _ in range(2):
        assert run_cached(tmp_path, [bad]) == [None]
    assert computed == [bad]


def test_the_folder_must_be_one(tmp_path, config):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--out must be a folder"):
        run_cached(tmp_path / "file", [config])
