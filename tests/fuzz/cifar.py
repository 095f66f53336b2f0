"""Fuzz target: the reader of CIFAR-100. A folder or an archive is read, or refused in one sentence."""

import tempfile
from pathlib import Path

from fuzz.draw import Draw
from fuzz.sentence import check_sentence
from utils.cifar_files import archive, cifar_files

from gem_fast.paper.data import load_data
from gem_fast.paper.errors import InputError

FOLDER = tempfile.TemporaryDirectory(prefix="fuzz_cifar_")
FILES = cifar_files(n_train=3, n_test=2)
ARCHIVE = archive(FILES)


def spoiled(draw: Draw, data: bytes) -> bytes:
    """The same bytes with a few changed, taken out or put in, half of the time near the beginning."""
    for _ in range(1 + draw.below(4)):
        place = draw.below(65536) % (64 if draw.one_in(2) else len(data))
        data = data[:place] + draw.bytes(draw.below(4)) + data[place + draw.below(4) :] or b"\0"
    return data


def target(data: bytes) -> None:
    """Reads a folder of which a file may be spoiled, a pickle of any bytes, or an archive, which may be spoiled."""
    draw = Draw(data)
    form = draw.below(4)
    folder, path = Path(FOLDER.name) / "folder", Path(FOLDER.name) / "file.tar.gz"
    try:
        if form < 2:
            folder.mkdir(exist_ok=True)
            files = {**FILES, (file := draw.pick(list(FILES))): spoiled(draw, FILES[file])}
            if form == 1:
                files = {file.removesuffix(".bin"): draw.rest() for file in FILES}
            for other in folder.iterdir():
                other.unlink()
            for file, contents in files.items():
                (folder / file).write_bytes(contents)
            read = load_data(str(folder))
        else:
            path.write_bytes(spoiled(draw, ARCHIVE) if form == 3 else archive({**FILES, "train.bin": draw.rest()}))
            read = load_data(str(path))
    except InputError as error:
        check_sentence(error)
        return
    for images, labels in ((read.train_images, read.train_labels), (read.test_images, read.test_labels)):
        assert images.shape == (len(labels), 3, 32, 32)
        assert labels.min() >= 0
        assert labels.max() < 100
