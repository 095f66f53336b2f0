"""CIFAR-100 and split: which classes a task has, which outputs they are, and which examples."""

import pytest
import torch
from utils.cifar_files import all_classes

from gem_fast.paper.data import ImageData, load_data
from gem_fast.paper.errors import InputError
from gem_fast.paper.streams import STREAMS, cifar100, split


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered_data(n_train=60, n_test=24, classes=(0, 1, 2, 3, 4, 5), size=(2, 2)):
    """Images told apart by their pixels, of the given classes in turn."""

    def part(n, first):
        labels = torch.tensor(classes)[torch.arange(n) % len(classes)]
        return (first + torch.arange(n)).byte().view(-1, *(1 for _ in size)).repeat(1, *size), labels

    return ImageData("numbered", *part(n_train, 0), *part(n_test, 100))


@pytest.fixture
def images(tmp_path):
    """As CIFAR-100, with fewer examples."""
    return load_data(str(all_classes(tmp_path / "made-up", train_per_class=50, test_per_class=10)))


def in_use(stream, task):
    """Images and classes of a task's training and test examples, the classes as the data set numbers them."""
    mine = stream.tasks[task]
    offset = 0 if mine.outputs == range(stream.n_outputs) else mine.outputs.start
    of_output = dict(enumerate(c for t in stream.tasks for c in t.classes))
    for batches in (stream.batches(task, 7, 1, generator()), stream.test_batches(task)):
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        yield (x * 255).round().flatten(1)[:, 0].int().tolist(), [of_output[offset + int(label)] for label in y]


@pytest.mark.parametrize("head", ["task", "shared"])
@pytest.mark.parametrize("class_order", ["natural", "random"])
@pytest.mark.parametrize("n_tasks", [1, 2, 3, 4, 6])
def test_split_deals_out_the_classes(head, class_order, n_tasks):
    data = numbered_data(classes=(9, 3, 0, 7, 4, 5))  # a data set that leaves numbers out
    stream = split(data, n_tasks, None, generator(), head=head, class_order=class_order)
    assert (stream.n_tasks, stream.n_outputs, stream.input_shape, stream.architecture) == (n_tasks, 6, (4,), "mlp")
    classes = [c for task in stream.tasks for c in task.classes]
    assert sorted(classes) == [0, 3, 4, 5, 7, 9]
    assert (classes == sorted(classes)) == (class_order == "natural")
    assert max(len(t.classes) for t in stream.tasks) - min(len(t.classes) for t in stream.tasks) <= 1
    if head == "shared":
        assert stream.outputs == (range(6),) * n_tasks
    else:
        assert [output for outputs in stream.outputs for output in outputs] == list(range(6))
        assert [len(outputs) for outputs in stream.outputs] == [len(task.classes) for task in stream.tasks]
    seen_train, seen_test = [], []
    for task in range(n_tasks):
        (train, train_classes), (test, test_classes) = in_use(stream, task)
        assert set(train_classes) == set(test_classes) == set(stream.tasks[task].classes)
        assert train_classes == [int(data.train_labels[i]) for i in train]
        assert test_classes == [int(data.test_labels[i - 100]) for i in test]
        seen_train += train
        seen_test += test
    assert sorted(seen_train) == list(range(60))
    assert sorted(seen_test) == list(range(100, 124))


def test_split_of_the_digits():
    data = load_data("mnist-5k")
    stream = split(data)
    assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert stream.outputs == (range(0, 2), range(2, 4), range(4, 6), range(6, 8), range(8, 10))
    assert sum(len(task.labels) for task in stream.tasks) == 4000
    assert len({len(task.labels) for task in stream.tasks}) > 1  # tasks may differ in size
    for task in stream.tasks:
        assert task.labels.unique().tolist() == [0, 1]


def test_a_sample_is_part_of_the_task():
    everything = split(numbered_data(), 3, None, generator())
    sampled = split(numbered_data(), 3, 11, generator())
    for full, part in zip(everything.tasks, sampled.tasks, strict=True):
        assert len(part.labels) == 11
        assert torch.equal(full.images[:11], part.images)
        assert torch.equal(full.test_images, part.test_images)
        assert full.labels.tolist() != sorted(full.labels.tolist())  # in a random order


def test_incremental_cifar100(images):
    stream = cifar100(images)
    assert (stream.n_tasks, stream.n_outputs, stream.input_shape) == (20, 100, (3, 32, 32))
    assert stream.architecture == "resnet18"
    assert stream.data == images.name
    assert [task.classes for task in stream.tasks] == [tuple(range(k, k + 5)) for k in range(0, 100, 5)]
    assert stream.outputs == tuple(range(k, k + 5) for k in range(0, 100, 5))
    assert {len(task.labels) for task in stream.tasks} == {250}
    x, y = next(stream.batches(3, 10, 1, generator()))
    assert (x.shape, x.dtype, y.dtype) == ((10, 3, 32, 32), torch.float32, torch.int64)
    assert 0 <= x.min() < 0.1 < 0.9 < x.max() <= 1
    x, y = next(stream.test_batches(3))
    assert torch.equal(x, images.test_images[(images.test_labels // 5) == 3] / 255)
    assert torch.equal(y, images.test_labels[(images.test_labels // 5) == 3] - 15)


def test_the_order_of_classes_is_seeded(images):
    orders = [
        [task.classes for task in cifar100(images, 10, 20, generator(seed), class_order="random").tasks]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(c for classes in orders[0] for c in classes) == list(range(100))


def test_another_order_of_the_tasks_keeps_their_outputs():
    stream = split(numbered_data(), 3, None, generator())
    turned = stream.in_order([1, 2, 0])
    assert turned.outputs == (range(2, 4), range(4, 6), range(0, 2))
    assert torch.equal(turned.tasks[2].labels, stream.tasks[0].labels)
    with_all = [len(list(s.tensors())) for s in (stream, turned)]
    assert with_all == [12, 12]


def test_a_stream_moves_as_a_whole():
    stream = split(numbered_data(), 2).to(torch.device("meta"))
    assert stream.device.type == "meta"
    tensors = [*next(stream.batches(0, 6, 1, generator())), *next(stream.test_batches(1)), *stream.tensors()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: split(numbered_data(), 7), "--tasks must be at most 6, the classes of numbered, got 7"),
        (lambda: split(numbered_data(), 3, 21), "--samples-per-task must be at most 20, the training examples of task"),
        (
            lambda: split(numbered_data(n_test=3), 3),
            r"must have test examples of every task's classes, got none of \[4",
        ),
        (lambda: split(numbered_data(size=(3, 4, 4)), 2), "--data must hold grey images for the stream split, got num"),
        (lambda: cifar100(numbered_data()), "--data must be CIFAR-100 for the stream cifar100 .* got numbered"),
        (lambda: cifar100(numbered_data(size=(3, 31, 32))), "--data must be CIFAR-100"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_every_stream_is_registered_under_its_name():
    assert [make.__name__ for make in STREAMS.values()] == list(STREAMS)
