"""Rotations and permutations: what a task shows, which examples it has, in which order they come."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gem_fast.paper.data import ImageData
from gem_fast.paper.errors import InputError
from gem_fast.paper.streams import STREAMS, permutations, pixels, rotations
from gem_fast.paper.streams.pixels import rotation_map


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_data(n_train=40, n_test=12, size=(7, 9), seed=0):
    g = generator(seed)

    def part(n):
        return torch.randint(256, (n, *size), generator=g).byte(), torch.randint(5, (n,), generator=g)

    return ImageData("random", *part(n_train), *part(n_test))


def numbered_data(n_train=40):
    """Every training image is filled with its own number, counted from 1, and labelled with the number from 0."""
    numbers = torch.arange(n_train)
    images = (numbers + 1).byte()[:, None, None].expand(-1, 3, 3)
    return ImageData("numbered", images, numbers, images[:5], numbers[:5])


@pytest.fixture(params=[rotations, permutations])
def make_stream(request):
    return request.param


@pytest.mark.parametrize("size", [(28, 28), (7, 9), (9, 7), (1, 1)])
@pytest.mark.parametrize("angle", [0.0, 0.3, 37.3, 45.0, 90.0, 123.4, 179.99])
def test_a_rotation_map_is_pillows_rotation(size, angle):
    image = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8)
    rotated = np.asarray(Image.fromarray(image).rotate(angle))
    with_blank = np.append(image.ravel(), 0)
    np.testing.assert_array_equal(with_blank[rotation_map(*size, angle)], rotated.ravel())


def test_each_rotation_is_from_its_slice_of_180_degrees():
    n_tasks, size = 6, (7, 9)
    stream = rotations(random_data(size=size), n_tasks, 5, generator())
    for k, task in enumerate(stream.tasks):
        angles = np.linspace(k, k + 1, 200) * 180 / n_tasks
        assert any(torch.equal(task.pixel_map, rotation_map(*size, angle)) for angle in angles)


def test_each_permutation_is_one_and_its_own():
    stream = permutations(random_data(), 5, 5, generator())
    for task in stream.tasks:
        assert task.pixel_map.sort().values.tolist() == list(range(63))
    assert len({tuple(task.pixel_map.tolist()) for task in stream.tasks}) == 5


def test_training_and_test_images_are_shown_through_the_same_map(make_stream, monkeypatch):
    monkeypatch.setattr(pixels, "TEST_BATCH", 5)
    data = random_data()
    stream = make_stream(data, 4, len(data.train_labels), generator())
    for k, task in enumerate(stream.tasks):

        def through_map(images, task=task):
            return torch.nn.functional.pad(images.flatten(1), (0, 1))[:, task.pixel_map]

        # All examples are drawn, in some order.
        assert sorted(task.images.tolist()) == sorted(through_map(data.train_images).tolist())
        batches = list(stream.test_batches(k))
        assert [len(y) for _, y in batches] == [5, 5, 2]
        assert torch.equal(torch.cat([x for x, _ in batches]), through_map(data.test_images).float() / 255)
        assert torch.equal(torch.cat([y for _, y in batches]), data.test_labels)


def test_a_task_draws_examples_without_replacement_and_anew_for_each_task():
    stream = permutations(numbered_data(), 3, 30, generator())
    samples = [task.labels.tolist() for task in stream.tasks]
    for task, sample in zip(stream.tasks, samples, strict=True):
        assert len(set(sample)) == 30
        assert torch.equal(task.images, (task.labels + 1).byte()[:, None].expand(-1, 9))
    assert len({tuple(sorted(sample)) for sample in samples}) == 3


def test_every_epoch_has_every_example_once_in_a_new_order(make_stream):
    data = random_data()
    stream = make_stream(data, 2, 23, generator())
    batches = list(stream.batches(1, 10, 3, generator()))
    assert [len(y) for _, y in batches] == [10, 10, 3] * 3
    expected = sorted(zip((stream.tasks[1].images / 255).tolist(), stream.tasks[1].labels.tolist(), strict=True))
    epochs = [batches[i : i + 3] for i in (0, 3, 6)]
    orders = set()
    for epoch in epochs:
        x, y = (torch.cat(parts) for parts in zip(*epoch, strict=True))
        assert x.dtype == torch.float32
        assert 0 <= x.min() <= x.max() <= 1
        assert sorted(zip(x.tolist(), y.tolist(), strict=True)) == expected
        orders.add(tuple(x[:, 0].tolist()))
    assert len(orders) == 3


def test_the_generator_alone_decides(make_stream):
    data = random_data()

    def everything(seed, global_seed):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        g = generator(seed)
        stream = make_stream(data, 3, 20, g)
        batches = [x for task in range(3) for x, _ in stream.batches(task, 6, 2, g)]
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat(batches)

    assert torch.equal(everything(0, 1), everything(0, 2))
    assert not torch.equal(everything(0, 1), everything(1, 1))


def test_a_stream_moves_as_a_whole(make_stream):
    stream = make_stream(random_data(), 2, 20, generator()).to(torch.device("meta"))
    x, y = next(stream.batches(0, 6, 1, generator()))
    test_x, test_y = next(stream.test_batches(1))
    assert {tensor.device.type for tensor in (x, y, test_x, test_y)} == {"meta"}


def test_sizes_come_from_the_data(make_stream):
    stream = make_stream(random_data(size=(4, 6)), 2, 20, generator())
    assert (stream.input_shape, stream.n_outputs, stream.n_tasks) == ((24,), 5, 2)
    assert stream.outputs == (range(5), range(5))
    assert (stream.architecture, stream.data, stream.device) == ("mlp", "random", torch.device("cpu"))


def test_a_part_of_a_tasks_examples(make_stream):
    stream = make_stream(random_data(), 2, 23, generator())
    x, y = (torch.cat(parts) for parts in zip(*stream.batches(1, 4, 2, generator(), range(5, 12)), strict=True))
    assert x.shape == (14, 63)
    expected = sorted(
        zip((stream.tasks[1].images[5:12] / 255).tolist(), stream.tasks[1].labels[5:12].tolist(), strict=True)
    )
    for half in (slice(0, 7), slice(7, 14)):
        assert sorted(zip(x[half].tolist(), y[half].tolist(), strict=True)) == expected


def test_another_order_of_the_tasks(make_stream):
    stream = make_stream(random_data(), 3, 20, generator())
    turned = stream.in_order([2, 0, 1])
    for new, old in enumerate([2, 0, 1]):
        assert torch.equal(turned.tasks[new].images, stream.tasks[old].images)
        x, other = next(turned.test_batches(new))[0], next(stream.test_batches(old))[0]
        assert torch.equal(x, other)


def test_a_stream_yields_all_that_makes_it_differ(make_stream):
    one, same, other = (list(make_stream(random_data(seed=seed), 2, 20, generator()).tensors()) for seed in (0, 0, 1))
    assert len(one) == 2 + 2 * 3
    assert all(map(torch.equal, one, same))
    assert not all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "cifar100"])
def test_images_in_colour(name):
    data = random_data(size=(3, 8, 8))
    with pytest.raises(InputError, match=f"--data must hold grey images for the stream {name}, got random with images"):
        STREAMS[name](data, 2, 5, generator())


def test_more_examples_than_there_are(make_stream):
    with pytest.raises(InputError, match="--samples-per-task must be at most 40, the training examples of random, got"):
        make_stream(random_data(), 2, 41, generator())


def test_rotations_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"rotations needs a package.*PIL.*pip install 'gem_fast\[demo\]'"):
        rotations(random_data(), 2, 5, generator())
