"""Schedules: every example of a task comes in one experience, and mini-batches are numbered without a gap."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gem_fast.paper.data import ImageData
from gem_fast.paper.errors import InputError
from gem_fast.paper.streams import split
from gem_fast.paper.streams.schedule import make_schedule


def stream_of(sizes):
    """A stream whose tasks have these numbers of training examples."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    test = torch.arange(len(sizes))
    return split(
        ImageData("sizes", torch.zeros(len(labels), 1, 1).byte(), labels, torch.zeros(len(sizes), 1, 1), test),
        len(sizes),
    )


@given(st.lists(st.integers(3, 12), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_experiences(sizes, batch_size, epochs, rounds):
    stream = stream_of(sizes)
    schedule = make_schedule(stream, batch_size, epochs, rounds)
    assert [experience.task for experience in schedule.experiences] == list(range(len(sizes))) * rounds
    for task, size in enumerate(sizes):
        mine = [experience.examples for experience in schedule.experiences if experience.task == task]
        assert [number for examples in mine for number in examples] == list(range(size))
        assert max(map(len, mine)) - min(map(len, mine)) <= 1
    number = 0
    for experience, end in zip(schedule.experiences, schedule.ends, strict=True):
        batches = list(stream.batches(experience.task, batch_size, epochs, torch.Generator(), experience.examples))
        assert len(batches) == experience.batches
        number += len(batches)
        assert number == end


def test_more_rounds_than_examples():
    with pytest.raises(InputError, match="--rounds must be at most 3, the training examples of task 2, got 4"):
        make_schedule(stream_of([5, 3]), 1, 1, rounds=4)
