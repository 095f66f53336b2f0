"""CIFAR-100, and what strangers put into files of its name."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from utils.cifar_files import archive, cifar_arrays, cifar_files

from gem_fast.paper.data import cifar, load_data
from gem_fast.paper.errors import InputError

IMAGE = bytes(3072)


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    return folder


@pytest.mark.parametrize("prefix", ["", "./"])
def test_folder_and_archive_hold_the_same(tmp_path, prefix):
    files, arrays = cifar_files(), cifar_arrays()
    folder = write(tmp_path / "any name", files)
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(archive(files, f"{prefix}cifar-100-binary"))
    for source in (folder, path):
        data = load_data(str(source))
        assert data.name == str(source)
        assert data.train_images.shape == (30, 3, 32, 32)
        assert data.test_images.dtype == torch.uint8
        assert data.test_labels.dtype == torch.int64
        for part, (images, labels) in (("train", arrays["train.bin"]), ("test", arrays["test.bin"])):
            np.testing.assert_array_equal(getattr(data, f"{part}_images").flatten(1), images)
            np.testing.assert_array_equal(getattr(data, f"{part}_labels"), labels)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "must have 3074 bytes for each image of CIFAR-100, at least one, got 0 bytes"),
        (b"hello", "got 5 bytes: it is truncated, or another file"),
        (b"\0" + IMAGE, "got 3073 bytes: it is truncated, or another file"),  # as in CIFAR-10
        (cifar_files()["train.bin"][:-1], "it is truncated"),
        (b"\x14\0" + IMAGE, "a coarse label below 20, the same for all images of a class, and a fine one below 100"),
        (b"\0\x64" + IMAGE, "a fine one below 100 before each image, got others"),
        (b"\0\x01" + IMAGE + b"\x01\x01" + IMAGE, "the same for all images of a class"),
        (b"\x01\0" + IMAGE + b"\x01\x07" + IMAGE + b"\x02\0" + IMAGE, "the same for all images of a class"),
        (cifar_files(n_train=31)["train.bin"], "no more test than training images, got 30 .* 31 .* swapped"),
    ],
)
def test_bad_files(tmp_path, contents, message):
    files = {**cifar_files(), "test.bin": contents}
    path = tmp_path / "cifar.tgz"
    path.write_bytes(archive(files))
    for source in (write(tmp_path / "folder", files), path):
        with pytest.raises(InputError, match=message) as raised:
            load_data(str(source))
        assert str(source) in str(raised.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(shift=st.integers(1, 3073), seed=st.integers(0, 1000))
def test_rows_that_begin_at_another_byte_are_noticed(tmp_path, shift, seed):
    files = cifar_files(n_train=40, n_test=2, seed=seed)
    whole = files["train.bin"]
    write(tmp_path, {**files, "train.bin": whole[shift:] + whole[:shift]})
    with pytest.raises(InputError, match="must have a coarse label below 20"):
        load_data(str(tmp_path))


# ---- the Python format -----------------------------------------------------------------------------------------------


def pickles():
    """The files train and test as the published archive has them, but smaller."""
    return {
        file.removesuffix(".bin"): pickle.dumps(
            {b"fine_labels": labels.tolist(), b"data": images, b"filenames": [b"a.png"]}, protocol=2
        )
        for file, (images, labels) in cifar_arrays().items()
    }


def test_published_pickles_are_read(tmp_path, monkeypatch):
    files, arrays = pickles(), cifar_arrays()
    for file, contents in files.items():
        monkeypatch.setitem(cifar.MD5, file, hashlib.md5(contents).hexdigest())
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(archive(files, "cifar-100-python"))
    for source in (write(tmp_path / "folder", files), path):
        data = load_data(str(source))
        np.testing.assert_array_equal(data.train_images.flatten(1), arrays["train.bin"][0])
        np.testing.assert_array_equal(data.test_labels, arrays["test.bin"][1])
        assert data.train_images.shape[1:] == (3, 32, 32)
        assert data.train_labels.dtype == torch.int64


def test_no_other_pickle_is_loaded(tmp_path, monkeypatch):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/attacked",)

    files = pickles()
    monkeypatch.setitem(cifar.MD5, "train", hashlib.md5(files["train"]).hexdigest())
    files["test"] = pickle.dumps(Attack())
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(archive(files, "cifar-100-python"))
    for source in (write(tmp_path / "folder", files), path):
        with pytest.raises(
            InputError, match=r"whose MD5 is f0ef6b0a.*, got .*: use the binary format, cifar-100-binary"
        ):
            load_data(str(source))
    assert not (tmp_path / "attacked").exists()


# ---- archives --------------------------------------------------------------------------------------------------------


def test_bad_archives(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    sound = archive(cifar_files())
    raw = gzip.decompress(sound)
    none = r"has no cifar-100-binary/train.bin and test.bin or cifar-100-python/train and test: it is truncated, or not"
    for contents, message in (
        (sound[: len(sound) // 2], "is truncated: its gzip data ends too early"),
        (b"hello", "is not a sound gzip file"),
        (sound[:1000] + b"\0" * 20 + sound[1020:], "is not a sound gzip file"),
        (gzip.compress(raw[: len(raw) // 2]), "is not a sound tar archive: unexpected end of data"),
        (gzip.compress(raw[:100]), "is not a sound tar archive"),
        (gzip.compress(bytes(10240)), none),
        (gzip.compress(b"\xff" * 10240), "is not a sound tar archive"),
        (archive({"train.bin": cifar_files()["train.bin"]}), none),
        (archive(cifar_files(), folder="cifar-10-batches-bin"), none),
    ):
        path.write_bytes(contents)
        with pytest.raises(InputError, match=message):
            load_data(str(path))
    with pytest.raises(InputError, match=r"nowhere\.tar\.gz cannot be read: No such file"):
        load_data(str(tmp_path / "nowhere.tar.gz"))


def special(**attributes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("cifar-100-binary/train.bin")
        for name, value in attributes.items():
            setattr(member, name, value)
        tar.addfile(member)
    return packed.getvalue()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_members_that_are_no_files(tmp_path, kind):
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(special(type=kind, linkname="/etc/passwd"))
    with pytest.raises(InputError, match="has no cifar-100-binary/train"):
        load_data(str(path))


def test_archives_that_grow(tmp_path, monkeypatch):
    path = tmp_path / "cifar.tar.gz"
    monkeypatch.setattr(cifar, "MAX_ARCHIVE_BYTES", 1 << 20)
    monkeypatch.setattr(cifar, "MAX_BYTES", 1 << 18)
    path.write_bytes(archive({"more": bytes(1 << 22), **cifar_files(2, 2)}))
    with pytest.raises(InputError, match="must unpack to at most 1048576 bytes, got more"):
        load_data(str(path))
    path.write_bytes(archive(cifar_files(100, 2)))
    with pytest.raises(InputError, match=r"train.bin in .* must have at most 262144 bytes, got more"):
        load_data(str(path))
    with pytest.raises(InputError, match=r"train\.bin must have at most 262144 bytes, got more"):
        load_data(str(write(tmp_path / "folder", cifar_files(100, 2))))
    many = {f"file{i}": b"" for i in range(cifar.MAX_MEMBERS)}
    path.write_bytes(archive({**many, **cifar_files(2, 2)}))
    with pytest.raises(InputError, match=r"must unpack to at most|has no cifar-100-binary/train"):
        load_data(str(path))
