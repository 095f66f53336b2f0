"""The protocol: who is called when, in which mode, and what is kept of it."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from utils.cifar_files import all_classes

from gem_fast import metrics
from gem_fast.paper.data import ImageData
from gem_fast.paper.errors import Diverged
from gem_fast.paper.experiments.protocol import Record, evaluate, learn_stream
from gem_fast.paper.experiments.training_run import TrainingRun, configuration
from gem_fast.paper.learners import LEARNERS, PRESETS, make_learner
from gem_fast.paper.learners.stream_info import StreamInfo
from gem_fast.paper.streams import STREAMS, permutations, rotations
from gem_fast.paper.streams.schedule import make_schedule


def groups(values):
    return [(key, len(list(same))) for key, same in itertools.groupby(values.tolist())]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_stream(n_tasks=3, samples_per_task=10):
    g = generator()
    labels = torch.arange(40) % 4
    images = torch.randint(60, (40, 4, 4), generator=g).byte()
    images[torch.arange(40), labels] += 190  # the class is where the bright row is
    data = ImageData("rows", images, labels, images, labels)
    return permutations(data, n_tasks, samples_per_task, g)


def noise(n):
    return torch.randint(256, (n, 28, 28), generator=generator()).byte()


def make_single(stream, lr=0.1):
    torch.manual_seed(0)
    return make_learner("single", StreamInfo.of(stream), torch.device("cpu"), lr=lr)


def make_gem(stream, lr=0.1):
    torch.manual_seed(0)
    stream_info = StreamInfo.of(stream)
    hyper = {**PRESETS["rotations", "gem"], "lr": lr, "memory_per_task": 8, "ridge": 0.0}
    return make_learner("gem", stream_info, torch.device("cpu"), **hyper)


def learn(learner, stream, batch_size=4, epochs=2, eval_every=100, rounds=1, watch=()):
    schedule = make_schedule(stream, batch_size, epochs, rounds)
    return learn_stream(learner, stream, schedule, eval_every=eval_every, generator=generator(), watch=watch)


class Spy(torch.nn.Module):
    """Answers the class number `observed % 4` and notes every call."""

    trains_jointly = False

    def __init__(self):
        super().__init__()
        self.calls = []
        self.observed = 0

    def observe(self, x, y, task):
        assert self.training
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not x.is_inference()
        assert not y.is_inference()
        self.calls.append(("observe", task, len(y)))
        self.observed += 1

    def predict(self, x, task):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.calls.append(("predict", task, len(x)))
        return F.one_hot(torch.full((len(x),), self.observed % 4), 4).float()


def test_order_of_calls():
    stream = make_stream(n_tasks=2)
    spy = Spy()
    learn(spy, stream, batch_size=4, epochs=2, eval_every=4)
    evaluation = [("predict", 0, 40), ("predict", 1, 40)]
    expected = list(evaluation)
    for task in (0, 1):
        sizes = [4, 4, 2, 4, 4, 2]
        batches = [("observe", task, size) for size in sizes]
        expected += [*batches[:4], *evaluation, *batches[4:], *evaluation]
    assert spy.calls == expected
    assert spy.training


def newest(record):
    """The accuracies of an evaluation after the last mini-batch, if there was one."""
    return record.accuracy[-1] if record.batch[-1:].tolist() == [record.batches] else None


def test_record():
    stream = make_stream(n_tasks=3)
    seen = []
    record = learn(Spy(), stream, eval_every=4, watch=[lambda record: seen.append((record.batches, newest(record)))])
    assert record.batch.tolist() == [4, 6, 10, 12, 16, 18]
    assert record.task.tolist() == [0, 0, 1, 1, 2, 2]
    assert record.accuracy.shape == (6, 3)
    np.testing.assert_array_equal(record.baseline, [0.25] * 3)
    np.testing.assert_array_equal(record.R, metrics.r_matrix(record.accuracy, record.task))
    assert record.acc == metrics.acc(record.R)
    assert record.bwt == metrics.bwt(record.R)
    assert record.fwt == metrics.fwt(record.R, record.baseline)
    assert record.train_seconds > 0
    assert record.eval_seconds > 0
    assert [batches for batches, _ in seen] == list(range(1, 19))
    evaluations = [accuracy for _, accuracy in seen if accuracy is not None]
    np.testing.assert_array_equal(evaluations, record.accuracy)
    assert [batches for batches, accuracy in seen if accuracy is not None] == record.batch.tolist()


def test_a_record_comes_back_from_plain_values():
    record = learn(Spy(), make_stream(), eval_every=4)
    again = Record.of(json.loads(json.dumps(record.to_dict())), record.batches)
    assert again.to_dict() == record.to_dict()
    assert [(name, value.dtype) for name, value in vars(again).items() if hasattr(value, "dtype")] == [
        (name, value.dtype) for name, value in vars(record).items() if hasattr(value, "dtype")
    ]


def test_tasks_that_come_back():
    stream = make_stream(n_tasks=2, samples_per_task=10)
    record = learn(Spy(), stream, batch_size=2, epochs=1, eval_every=2, rounds=2)
    assert record.task.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [task for task, _ in groups(record.task)] == [0, 1, 0, 1]
    # Five examples are three mini-batches: an evaluation after two of them, and at the end of the experience.
    assert record.batch.tolist() == [2, 3, 5, 6, 8, 9, 11, 12]
    # R is measured at the end of the last experience of each task.
    np.testing.assert_array_equal(record.R, record.accuracy[[5, 7]])


def test_each_experience_brings_new_examples():
    stream = make_stream(n_tasks=2, samples_per_task=11)
    seen: dict[int, list[list[float]]] = {0: [], 1: []}

    class Notes(Spy):
        def observe(self, x, y, task):
            super().observe(x, y, task)
            seen[task] += x.tolist()

    learn(Notes(), stream, batch_size=3, epochs=1, rounds=3)
    for task, examples in seen.items():
        assert sorted(examples) == sorted((stream.tasks[task].images / 255).tolist())


def test_evaluating_more_often_changes_nothing_else():
    stream = make_stream()
    seldom = learn(make_single(stream), stream, eval_every=1000)
    often = learn(make_single(stream), stream, eval_every=1)
    assert len(seldom.batch) == 3
    assert len(often.batch) == 18
    np.testing.assert_array_equal(seldom.R, often.R)


def test_the_generator_and_the_model_decide_everything():
    stream = make_stream()
    first, second = (learn(make_single(stream), stream, eval_every=1) for _ in range(2))
    np.testing.assert_array_equal(first.accuracy, second.accuracy)


def test_single_learns_one_task():
    stream = make_stream(n_tasks=1, samples_per_task=40)
    record = learn(make_single(stream, lr=0.5), stream, epochs=30)
    assert record.acc > 0.9


def test_accuracy_is_the_fraction_of_right_answers():
    stream = make_stream()
    single = make_single(stream)
    accuracy = evaluate(single, stream)
    assert accuracy.dtype == np.float64
    for task in range(3):
        x, y = next(stream.test_batches(task))
        assert accuracy[task] == (single.predict(x, task).argmax(1) == y).double().mean().item()


@pytest.mark.parametrize("density", [0.1, 0.9])
@pytest.mark.parametrize("make_stream", [rotations, permutations])
@pytest.mark.parametrize("learner", LEARNERS)
def test_the_weights_are_moved_instead_of_the_images(learner, make_stream, density):
    images = noise(70) * (torch.rand(70, 28, 28, generator=generator()) < density)
    labels = torch.arange(70) % 10
    stream = make_stream(ImageData("noise", images, labels, images, labels), 2, 70, generator())
    assert (next(stream.test_batches(0))[0]._entries is None) == (density > 0.5)
    torch.manual_seed(0)
    mine = make_learner(learner, StreamInfo.of(stream), torch.device("cpu"), **PRESETS["rotations", learner])
    for x, y in stream.batches(0, 10, 1, generator()):
        mine.observe(x, y, 0)
    mine.train(False)
    with torch.inference_mode():
        for task in range(2):
            for x, _ in stream.test_batches(task):
                images = x.contiguous()
                assert type(images) is torch.Tensor
                torch.testing.assert_close(mine.predict(x, task), mine.predict(images, task))


@pytest.mark.parametrize(("stream", "evaluations"), [("split", 2), ("cifar100", 1)])
def test_how_often_a_run_is_evaluated_by_default(tmp_path, stream, evaluations):
    data = str(all_classes(tmp_path / "made-up", 3)) if stream == "cifar100" else "mnist-5k"
    run = TrainingRun(configuration(stream, "single", data=data, tasks=5, samples_per_task=60))
    assert run.config["eval_every"] == 6 // evaluations


def test_single_is_plain_sgd():
    stream = make_stream()
    single = make_single(stream, lr=0.25)
    x, y = next(stream.batches(0, 4, 1, generator()))
    parameters = [p.detach().clone().requires_grad_() for p in single.model.parameters()]
    w1, b1, w2, b2, w3, b3 = parameters
    hidden = F.relu(F.linear(F.relu(F.linear(x, w1, b1)), w2, b2))
    F.cross_entropy(F.linear(hidden, w3, b3), y).backward()
    single.observe(x, y, 0)
    for updated, before in zip(single.model.parameters(), parameters, strict=True):
        torch.testing.assert_close(updated, before - 0.25 * before.grad)


def test_a_model_that_diverges_stops_the_run():
    stream = make_stream()
    single = make_single(stream)
    with torch.no_grad():
        single.model[0].weight[0, 0] = float("nan")
    with pytest.raises(Diverged, match="outputs are not finite any more"):
        learn(single, stream)


def test_a_learner_that_fails_because_the_model_diverged():
    stream = make_stream()
    gem = make_gem(stream)

    def diverge(record):
        if record.batches == 6:  # the second task begins
            with torch.no_grad():
                gem.model[0].weight[0, 0] = float("nan")

    with pytest.raises(Diverged, match="training diverged"):
        learn(gem, stream, watch=[diverge])


def test_any_other_failure_of_a_learner_is_its_own(monkeypatch):
    stream = make_stream()
    single = make_single(stream)
    monkeypatch.setattr(single.optimizer, "step", lambda: (_ for _ in ()).throw(RuntimeError("out of order")))
    with pytest.raises(RuntimeError, match="out of order"):
        learn(single, stream)


def test_gem_is_single_while_there_is_no_past_task():
    stream = make_stream(n_tasks=1)
    single, gem = make_single(stream), make_gem(stream)
    learn(single, stream)
    learn(gem, stream)
    for a, b in zip(single.model.parameters(), gem.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gem_forgets_less_than_single():
    stream = make_stream(n_tasks=4, samples_per_task=40)
    single = learn(make_single(stream, lr=0.3), stream, epochs=20)
    gem = learn(make_gem(stream, lr=0.3), stream, epochs=20)
    assert gem.bwt > single.bwt
    assert gem.acc > single.acc


def test_presets_fit_the_learners():
    assert {stream for stream, _ in PRESETS} == set(STREAMS)
    pairs = {(stream, learner) for stream in STREAMS for learner in LEARNERS}
    assert set(PRESETS) == pairs - {("cifar100", "multimodal")}
