"""The reader of pickles: plain data come out as they went in, and nothing else is looked at."""

import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from utils.python2_pickles import instructions, pickled

from gem_fast.paper.pickles import PickleError, loads

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31 - 1) | st.binary(max_size=300) | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.binary(max_size=9) | st.text(max_size=9), inner),
    max_leaves=20,
)


@given(VALUES)
def test_plain_values_of_python_2(value):
    assert loads(pickled(value)) == value


@given(VALUES, st.integers(3, pickle.HIGHEST_PROTOCOL))
def test_plain_values_of_python_3(value, protocol):
    assert loads(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i8", ">i4", "<u2"])
@pytest.mark.parametrize("shape", [(4, 6), (24,), (2, 3, 4), (0,), ()])
@pytest.mark.parametrize("order", "CF")
def test_arrays(dtype, shape, order):
    array = np.arange(np.prod(shape)).astype(dtype).reshape(shape, order=order)
    files = [pickle.dumps([array, array], protocol) for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1)]
    for file in [pickled([np.array(array, order="C")] * 2), *files]:
        for read in loads(file):
            np.testing.assert_array_equal(read, array, strict=True)


@pytest.mark.parametrize("package", [b"numpy.core", b"numpy._core"])
def test_names_of_old_and_new_numpy(package):
    array = np.arange(3, dtype=np.uint8)
    file = pickled(array).replace(b"numpy.core", package)
    np.testing.assert_array_equal(loads(file), array)


def test_an_array_in_several_places():
    array = instructions(np.arange(3, dtype=np.uint8))  # noted in the memo under the number 7
    for read in loads(b"\x80\x02](" + array + b"h\x07h\x07e."):
        np.testing.assert_array_equal(read, [0, 1, 2])


class Call:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("call", [(os.system, "touch {}"), (eval, "open('{}', 'w')"), (open, "{}", "w")])
def test_calls_are_not_made(tmp_path, protocol, call):
    file = tmp_path / "executed"
    function, first, *others = call
    with pytest.raises(PickleError, match="plain data"):
        loads(pickle.dumps([1, Call(function, first.format(file), *others)], protocol))
    assert not file.exists()


OBJECTS = [1.5, {1}, frozenset(), (1, 2), 1j, range(3), len, PickleError, 10**700, {1: 2}, {None: 1}, bytearray]


@pytest.mark.parametrize("value", OBJECTS, ids=str)
def test_other_objects(value):
    with pytest.raises(PickleError, match="holds something else than plain data"):
        loads(pickle.dumps([value], 4))


ARRAYS = [
    np.array([object]),
    np.array([{}, []], dtype=object),
    np.zeros(2, dtype="u1,i4"),
    np.zeros(2),
    np.zeros(2, dtype=bool),
    np.zeros(2, dtype="S3"),
    np.zeros(2, dtype="M8[s]"),
    np.zeros(2, dtype=complex),
    np.ma.masked_array([1], [True]),
    np.uint8(3),
    np.dtype("u1"),
]


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("array", ARRAYS, ids=repr)
def test_other_arrays(array, protocol):
    with pytest.raises(PickleError, match="holds something else than plain data"):
        loads(pickle.dumps(array, protocol))


def array_of(shape=(3,), code=b"u1", order=b"|", contents: object = b"abc", fortran: object = False) -> bytes:
    """An array as in Python 2, with any state."""
    dtype = b"cnumpy\ndtype\n" + instructions((code, 0, 1)) + b"R"
    dtype += instructions((3, order, None, None, None, -1, -1, 0)) + b"b"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + instructions((0,)) + b"U\x01btR"
    return made + b"(" + instructions(1) + instructions(shape) + dtype + instructions(fortran) + instructions(contents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (4,)}, r"an array of shape \(4,\) and dtype uint8 comes with 3 bytes"),
        ({"shape": (-3,)}, "the shape of an array makes no sense"),
        ({"shape": (2**31 - 1, 2**31 - 1, 2**31 - 1)}, "comes with 3 bytes"),
        ({"shape": (1,) * 70 + (3,)}, "the shape of an array makes no sense"),
        ({"shape": (b"3",)}, "the shape of an array makes no sense"),
        ({"shape": (True, 3)}, "the shape of an array makes no sense"),
        ({"shape": (0, 2**31 - 1, 2**31 - 1, 2**31 - 1), "contents": b""}, "is damaged"),
        ({"shape": [3]}, "an object that is no array"),
        ({"code": b"u16"}, "an array that is not one of integers"),
        ({"code": b"O8"}, "an array that is not one of integers"),
        ({"code": b"O"}, "an array that is not one of integers"),
        ({"code": b"u1,O"}, "an array that is not one of integers"),
        ({"code": [b"u1"]}, "an array that is not one of integers"),
        ({"order": b"x"}, "an object that is no array"),
        ({"contents": [1, 2, 3]}, "an object that is no array"),
        ({"contents": "abc"}, "an object that is no array"),
        ({"fortran": 7}, "an object that is no array"),
    ],
)
def test_arrays_with_a_state_that_makes_no_sense(change, message):
    assert loads(b"\x80\x02" + array_of() + b"tb.").tobytes() == b"abc"
    with pytest.raises(PickleError, match=message):
        loads(b"\x80\x02" + array_of(**change) + b"tb.")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"", "is damaged or truncated: got '' for an instruction"),
        (b".", "too little on the stack"),
        (b"K", "not enough data"),
        (b"a.", "too little on the stack"),
        (b"K\x01\x86.", "too little on the stack"),
        (b"\x86.", "too little on the stack"),
        (b"t.", "too little on the stack"),
        (b"q\x00.", "too little on the stack"),
        (b"K\x01K\x02a.", "an instruction for a list finds another object"),
        (b"]K\x02K\x03s.", "an instruction for a dict finds another object"),
        (b"}(U\x01au.", "a key without a value"),
        (b"h\x05.", "refers to an object that it does not hold"),
        (b"(.", "something else than plain data"),
        (b"cnumpy\ndtype\n.", "something else than plain data"),
        (b"](cnumpy\nndarray\ne.", "something else than plain data"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR.", "an array without contents"),
        (b"](](K\x01e0.", "the instruction POP"),
        (b"U\x01aU\x01b\x93.", "holds something else"),
        (b"X\x05\x00\x00\x00posixX\x06\x00\x00\x00system\x93.", "it asks for 'posix' 'system'"),
        (b"X\x05\x00\x00\x00a\nb\ncX\x01\x00\x00\x00\n\x93.", r"it asks for 'a\\nb\\nc' '\\n'"),
        (b"\x80\x02\xff.", r"is damaged or truncated: got '\xff' for an instruction"),
        (b"I1" + 10**5 * b"0" + b"\n.", "the instruction INT"),
    ],
)
def test_programs_that_make_no_sense(program, message):
    with pytest.raises(PickleError, match=message) as error:
        loads(program)
    assert "\n" not in str(error.value)


BOMBS = {
    "a memo of 4,294,967,295 places": b"]r\xff\xff\xff\xffU\x01ab.",
    "bytes of 4 exabytes": b"\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "bytes of 4 gigabytes": b"B\xff\xff\xff\xffabc.",
    "a text of 16 exabytes": b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc.",
    "a bytearray of 4 exabytes": b"\x96" + struct.pack("<Q", 2**62) + b"abc.",
    "a string of 2 gigabytes": b"T\xff\xff\xff\x7fabc.",
    "an integer of 2 gigabytes": b"\x8b\xff\xff\xff\x7fabc.",
    "a frame of 4 exabytes": b"\x95" + struct.pack("<Q", 2**62) + b"abc.",
    "tuples within tuples as a key": b"}" + b"K\x00" + 20000 * b"\x85" + b"Ns.",
    "2 ** 40 parts of a key": b"}" + b"K\x00" + 40 * b"q\x00h\x00\x86" + b"Ns.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name):
    tracemalloc.start()
    try:
        with pytest.raises(PickleError):
            loads(BOMBS[name])
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_lists_within_lists_are_plain_data():
    outer = loads(100_000 * b"]" + 99_999 * b"a" + b".")
    depth = 0
    while outer:
        (outer,) = outer
        depth += 1
    assert depth == 99_999


def test_too_many_instructions(monkeypatch):
    monkeypatch.setattr("gem_fast.paper.pickles.MAX_INSTRUCTIONS", 1000)
    assert loads(b"](" + 996 * b"N" + b"e.") == 996 * [None]
    with pytest.raises(PickleError, match="has more than 1000 instructions"):
        loads(b"](" + 997 * b"N" + b"e.")
