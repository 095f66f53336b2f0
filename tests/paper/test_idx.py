"""The IDX reader: what is written comes back; whatever else comes in, one exception."""

import gzip
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from utils.idx_files import idx_bytes

from gem_fast.paper.data.idx import read_idx
from gem_fast.paper.errors import InputError

# One folder serves all examples of a test: each example overwrites the file.
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def uint8_arrays(ndim):
    return arrays(np.uint8, array_shapes(min_dims=ndim, max_dims=ndim, max_side=6))


@one_folder
@given(array=st.sampled_from([1, 3]).flatmap(uint8_arrays), compressed=st.booleans())
def test_round_trip(tmp_path, array, compressed):
    path = tmp_path / ("file.gz" if compressed else "file")
    path.write_bytes(gzip.compress(idx_bytes(array)) if compressed else idx_bytes(array))
    read = read_idx(path, array.ndim)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


@one_folder
@given(array=uint8_arrays(3), compressed=st.booleans(), data=st.data())
def test_mutilated_files_parse_or_raise_the_one_exception(tmp_path, array, compressed, data):
    contents = bytearray(gzip.compress(idx_bytes(array)) if compressed else idx_bytes(array))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(contents)))
        stop = data.draw(st.integers(start, min(start + 4, len(contents))))
        contents[start:stop] = data.draw(st.binary(max_size=4))
    path = tmp_path / ("file.gz" if compressed else "file")
    path.write_bytes(contents)
    try:
        read = read_idx(path, 3)
    except InputError:
        return
    assert read.ndim == 3
    assert read.size > 0


@one_folder
@given(array=uint8_arrays(3), data=st.data())
def test_every_truncation_is_noticed(tmp_path, array, data):
    whole = idx_bytes(array)
    for name, contents in (("file", whole), ("file.gz", gzip.compress(whole))):
        path = tmp_path / name
        path.write_bytes(contents[: data.draw(st.integers(0, len(contents) - 1))])
        with pytest.raises(InputError, match=r"is truncated|must begin with|is not a sound gzip file"):
            read_idx(path, 3)


@pytest.mark.parametrize("name", ["file", "file.gz"])
def test_a_header_that_promises_the_moon_costs_no_memory(tmp_path, name):
    contents = struct.pack(">4B3I", 0, 0, 8, 3, *[2**32 - 1] * 3) + b"abc"
    path = tmp_path / name
    path.write_bytes(gzip.compress(contents) if name.endswith(".gz") else contents)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"promises 79\d+ bytes.* and 3 are there"):
            read_idx(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("file", b"", "must begin with the bytes 00 00 08 03, got an empty file"),
        ("file", b"\x89PNG....", "must begin with the bytes 00 00 08 03, got 89 50 4e 47"),
        ("file", idx_bytes(np.zeros(3, np.uint8)), "3 dimensions: .* got 00 00 08 01"),
        ("file", idx_bytes(np.zeros((0, 28, 28), np.uint8)), r"is empty: its header gives the shape \(0, 28, 28\)"),
        ("file", struct.pack(">4B3I", 0, 0, 8, 3, 0, 2**32 - 1, 2**32 - 1), "is empty"),
        ("file", idx_bytes(np.zeros((1, 2, 2), np.uint8)) + b"!", "bytes left over: its header promises 4 bytes"),
        ("file", gzip.compress(idx_bytes(np.zeros((1, 2, 2), np.uint8))), "must begin with"),
        ("file.gz", idx_bytes(np.zeros((1, 2, 2), np.uint8)), "is not a sound gzip file"),
        ("file.gz", gzip.compress(idx_bytes(np.zeros((1, 2, 2), np.uint8)) + b"!"), "bytes left over"),
        ("file.gz", gzip.compress(idx_bytes(np.zeros((1, 2, 2), np.uint8))) + b"!", "is not a sound gzip file"),
    ],
)
def test_refusals(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(InputError, match=message):
        read_idx(tmp_path / name, 3)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_idx(tmp_path / "nowhere", 3)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_idx(tmp_path, 3)
