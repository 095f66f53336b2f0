"""CIFAR-100, and what strangers put into files of its name."""

import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from utils.python2_pickles import archive, cifar_files, pickled

from gem_fast.paper import cifar
from gem_fast.paper.cifar import read_archive, read_folder
from gem_fast.paper.data import load_data
from gem_fast.paper.errors import InputError
from gem_fast.paper.standin import make_stand_in, write_stand_in


def state(n=4, **change):
    made = {b"fine_labels": [i % 100 for i in range(n)], b"data": np.zeros((n, 3072), np.uint8)} | {
        name.encode(): value for name, value in change.items()
    }
    return {key: value for key, value in made.items() if value is not ...}


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    return folder


@pytest.mark.parametrize("prefix", ["", "./"])
def test_folder_and_archive_hold_the_same(tmp_path, prefix):
    files = cifar_files()
    folder = write(tmp_path / "cifar-100-python", files)
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(archive(files, prefix + "cifar-100-python"))
    for read in (read_folder(folder), read_archive(path)):
        for part, contents in files.items():
            expected = pickle.loads(contents, encoding="bytes")  # our own file
            assert read[part].images.reshape(-1, 3072).tolist() == expected[b"data"].tolist()
            assert read[part].labels.tolist() == expected[b"fine_labels"]
            assert read[part].images.shape[1:] == (3, 32, 32)
            assert not read[part].stand_in
    for source in (folder, path):
        data = load_data(str(source))
        assert data.name == str(source)
        assert data.train_images.shape == (30, 3, 32, 32)
        assert data.test_images.dtype == torch.uint8
        assert data.test_labels.dtype == torch.int64


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_files_that_python_3_wrote(tmp_path, protocol):
    names = {"data": np.ones((3, 3072), np.uint8), "fine_labels": np.array([3, 99, 0])}
    file = pickle.dumps(names, protocol)
    read = read_folder(write(tmp_path / "folder", {"train": file, "test": file}))
    assert read["train"].labels.tolist() == [3, 99, 0]
    assert read["test"].images.all()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (pickled([1]), "must hold a dictionary, got list"),
        (pickled({b"data": 1}), "without fine_labels"),
        (pickled(state(data=...)), "without data"),
        (pickled(state(data=[1, 2])), r"data in .* must be an array of shape \(n, 3072\), uint8, got list"),
        (pickled(state(data=np.zeros((4, 3073), np.uint8))), r"got shape \(4, 3073\), uint8"),
        (pickled(state(data=np.zeros(3072, np.uint8))), r"got shape \(3072,\), uint8"),
        (pickled(state(data=np.zeros((4, 3072), np.int8))), r"got shape \(4, 3072\), int8"),
        (pickled(state(data=np.zeros((4, 3, 1024), np.uint8))), r"got shape \(4, 3, 1024\), uint8"),
        (pickled(state(data=np.zeros((), np.uint8))), r"got shape \(\), uint8"),
        (pickled(state(n=0)), "each of its 0 images, at least one, got 0 labels"),
        (pickled(state(fine_labels=[1, 2])), "each of its 4 images, at least one, got 2 labels"),
        (pickled(state(fine_labels=3)), "at least one, got int"),
        (pickled(state(fine_labels=np.zeros((4, 1), np.uint8))), "at least one, got ndarray"),
        (pickled(state(fine_labels=[0, 1, 2, 100])), "integers between 0 and 99, got 100"),
        (pickled(state(fine_labels=[0, 1, -1, 2])), "integers between 0 and 99, got -1"),
        (pickled(state(fine_labels=[0, 1, b"2", 2])), "integers between 0 and 99, got bytes"),
        (pickled(state(fine_labels=[0, 1, True, 2])), "integers between 0 and 99, got bool"),
        (pickle.dumps(state(data=np.array([None] * 4, dtype=object))), "holds something else than plain data"),
        (pickle.dumps({"data": os.system}), "holds something else than plain data"),
        (pickled(state())[:-3000], "is damaged or truncated"),
        (b"", "is damaged or truncated"),
        (b"hello", "holds something else than plain data|is damaged"),
    ],
)
def test_bad_files(tmp_path, contents, message):
    sound = pickled(state())
    folder = write(tmp_path / "folder", {"train": sound, "test": contents})
    path = tmp_path / "cifar.tgz"
    path.write_bytes(archive({"train": contents, "test": sound}))
    for source in (folder, path):
        with pytest.raises(InputError, match=message) as error:
            load_data(str(source))
        assert str(source) in str(error.value)
        assert "\n" not in str(error.value)


def test_bad_archives(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    sound = archive(cifar_files())
    raw = gzip.decompress(sound)
    for contents, message in (
        (sound[: len(sound) // 2], "is truncated: its gzip data ends too early"),
        (sound[:5], "is truncated"),
        (b"", "is not a sound tar archive"),
        (b"hello", "is not a sound gzip file"),
        (sound[:1000] + b"\0" * 20 + sound[1020:], "is not a sound gzip file"),
        (gzip.compress(raw[: len(raw) // 2]), "is not a sound tar archive: unexpected end of data"),
        (gzip.compress(raw[:100]), "is not a sound tar archive"),
        (gzip.compress(bytes(10240)), "has no cifar-100-python/train"),
        (gzip.compress(b"\xff" * 10240), "is not a sound tar archive"),
        (archive({"train": pickled(state())}), "has no cifar-100-python/test: it is truncated, or not"),
        (archive(cifar_files(), folder="cifar-10-batches-py"), "has no cifar-100-python/train"),
    ):
        path.write_bytes(contents)
        with pytest.raises(InputError, match=message):
            load_data(str(path))
    with pytest.raises(InputError, match=r"nowhere\.tar\.gz cannot be read: No such file"):
        load_data(str(tmp_path / "nowhere.tar.gz"))


def special(**attributes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("cifar-100-python/train")
        for name, value in attributes.items():
            setattr(member, name, value)
        tar.addfile(member)
    return packed.getvalue()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_members_that_are_no_files(tmp_path, kind):
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(special(type=kind, linkname="/etc/passwd"))
    with pytest.raises(InputError, match="has no cifar-100-python/train"):
        load_data(str(path))


def test_archives_that_grow(tmp_path, monkeypatch):
    path = tmp_path / "cifar.tar.gz"
    monkeypatch.setattr(cifar, "MAX_ARCHIVE_BYTES", 1 << 20)
    monkeypatch.setattr(cifar, "MAX_BYTES", 1 << 18)
    path.write_bytes(archive({"meta": bytes(1 << 22), **cifar_files(2, 2)}))
    with pytest.raises(InputError, match="must unpack to at most 1048576 bytes, got more"):
        load_data(str(path))
    path.write_bytes(archive(cifar_files(100, 2)))
    with pytest.raises(InputError, match=r"train in .* must have at most 262144 bytes, got more"):
        load_data(str(path))
    with pytest.raises(InputError, match="train must have at most 262144 bytes, got more"):
        load_data(str(write(tmp_path / "folder", cifar_files(100, 2))))
    many = {f"file{i}": b"" for i in range(cifar.MAX_MEMBERS)}
    path.write_bytes(archive({**many, **cifar_files(2, 2)}))
    with pytest.raises(InputError, match=r"must unpack to at most|has no cifar-100-python/train"):
        load_data(str(path))


# ---- the stand-in ----------------------------------------------------------------------------------------------------


def test_a_stand_in_is_in_the_format_and_says_what_it_is(tmp_path):
    made = make_stand_in(seed=3, train_per_class=2, test_per_class=1)
    path = tmp_path / "anything.tar.gz"
    write_stand_in(path, seed=3, train_per_class=2, test_per_class=1)
    read = read_archive(path)
    for part, n in (("train", 200), ("test", 100)):
        assert read[part].stand_in
        np.testing.assert_array_equal(read[part].images, made[part].images)
        np.testing.assert_array_equal(read[part].labels, made[part].labels)
        assert np.bincount(read[part].labels).tolist() == [n // 100] * 100
    assert load_data(str(path)).name == f"{path} (a stand-in, not CIFAR-100)"
    before = path.read_bytes()
    write_stand_in(path, seed=3, train_per_class=2, test_per_class=1)
    assert path.read_bytes() == before
    write_stand_in(path, seed=4, train_per_class=2, test_per_class=1)
    assert path.read_bytes() != before


def test_a_stand_in_can_be_learned():
    data = load_data("cifar100-stand-in")
    assert data.name == "cifar100-stand-in (a stand-in, not CIFAR-100)"
    images, labels = data.train_images.flatten(1).float(), data.train_labels
    means = torch.stack([images[labels == label].mean(0) for label in range(100)])
    answers = torch.cdist(data.test_images.flatten(1).float(), means).argmin(1)
    assert (answers == data.test_labels).float().mean() > 0.9
    assert images[labels == 0].std(0).mean() > 10  # from examples, since those of a class differ
