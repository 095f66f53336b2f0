"""Learners on real digits: what each of them must and must not touch, and that all of them learn."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from utils.learning import CPU, KINDS, accuracy, batches, digits, learn, make, stream_info, weights

from gem_fast.paper.experiments.protocol import learn_stream
from gem_fast.paper.learners import LEARNERS, PRESETS, make_learner
from gem_fast.paper.learners.stream_info import StreamInfo
from gem_fast.paper.models import MultiHeadModel
from gem_fast.paper.streams.schedule import joint_batches, make_schedule


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_learns(name: str, kind: str) -> None:
    stream, learner = digits(kind), make(name, kind)
    classes = len(stream_info(kind).outputs[0])
    generator = torch.Generator().manual_seed(0)
    learn_stream(learner, stream, make_schedule(stream, 10, epochs=3), eval_every=100, generator=generator)
    x = next(stream.test_batches(2))[0]
    assert learner.predict(x, 2).shape == (len(x), classes)
    chance = 1 / classes
    assert accuracy(learner, kind, 2) > chance + (1 - chance) / 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LEARNERS)
def test_predicting_leaves_no_trace(name: str, kind: str) -> None:
    quiet, asked = (make(name, kind) for _ in range(2))
    for x, y, task in batches(kind, per_task=5):
        quiet.observe(x, y, task)
        asked.observe(x, y, task)
        for other in range(3):
            accuracy(asked, kind, other)
    assert same(weights(quiet.model), weights(asked.model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LEARNERS)
def test_a_task_that_comes_back(name: str, kind: str) -> None:
    learner = learn(make(name, kind), batches(kind, per_task=5, tasks=(0, 1, 0, 2, 1)))
    assert all(w.isfinite().all() for w in weights(learner.model))
    assert accuracy(learner, kind, 1) > 1.5 / len(stream_info(kind).outputs[0]) - 0.2


def test_networks_whose_backward_in_the_fast_format_would_write_beyond_its_memory_keep_the_plain_one() -> None:
    info = StreamInfo(10, tuple(range(2 * k, 2 * k + 2) for k in range(10)), 20, (3, 32, 32), "resnet18")
    learner = make_learner("independent", info, CPU, **PRESETS["cifar100", "independent"])
    narrow = [c for c in learner.modules() if isinstance(c, nn.Conv2d) and c.stride == (2, 2) and c.in_channels < 8]
    assert narrow
    for convolution in learner.modules():
        assert not isinstance(convolution, nn.Conv2d) or convolution.weight.is_contiguous()


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "multimodal"])
def test_convolutions_stay_in_the_fast_format(name: str) -> None:
    info = StreamInfo(2, (range(3), range(3, 6)), 6, (3, 32, 32), "resnet18")
    # Small sizes, so that it takes a moment.
    small = {"memory_per_task": 4, "memory_batch": 4, "memory": 6}
    hyper = {key: small.get(key) or value for key, value in PRESETS["cifar100", name].items()}
    learner = make_learner(name, info, CPU, **hyper)
    x, y = torch.rand(3, 3, 32, 32), torch.arange(3)
    for task in (0, 1):
        learner.observe(x, y, task)
        learner.load_state_dict(learner.state_dict())
    convolutions = [module for module in learner.modules() if isinstance(module, nn.Conv2d)]
    assert convolutions
    for convolution in convolutions:
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    learner.train(False)
    fast = learner.predict(x, 1)
    learner.load_state_dict(learner.state_dict())  # empties caches
    for convolution in convolutions:
        convolution.weight.data = convolution.weight.data.contiguous()
    torch.testing.assert_close(learner.predict(x, 1), fast, rtol=1e-4, atol=1e-4)


# ---- StreamInfo ------------------------------------------------------------------------------------------------------


def test_slices_of_the_outputs() -> None:
    shared, multi_head = (stream_info(kind).new_model() for kind in KINDS)
    assert not isinstance(shared, MultiHeadModel)
    x = torch.rand(4, 784)
    for task in range(3):
        assert multi_head(x, task).equal(multi_head.network(x)[:, 2 * task : 2 * task + 2])


# ---- independent and multimodal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_independent_nets_do_not_touch_each_other(kind: str) -> None:
    learner = make("independent", kind, clone=False)
    start = [weights(net) for net in learner.nets]
    learn(learner, batches(kind, per_task=3, tasks=(0, 1)))
    assert [same(weights(net), before) for net, before in zip(learner.nets, start, strict=True)] == [0, 0, 1]
    alone = learn(make("independent", kind, clone=False), batches(kind, per_task=3, tasks=(0,)))
    assert same(weights(alone.nets[0]), weights(learner.nets[0]))
    hidden = 100 // 3
    assert [layer.out_features for layer in learner.nets[0] if isinstance(layer, nn.Linear)][:2] == [hidden, hidden]
    assert learner.predict(torch.rand(2, 784), 1).shape[1] == len(stream_info(kind).outputs[1])


@pytest.mark.parametrize("clone", [False, True])
def test_a_new_net_starts_as_a_clone_of_the_last(clone: bool) -> None:
    learner = make("independent", "shared", clone=clone, lr=1e-9)  # too small a step to see
    assert not torch.allclose(weights(learner.nets[0])[0], weights(learner.nets[1])[0])
    for task, like in ((0, 0), (2, 0), (1, 2)):
        before = weights(learner.nets[task])
        learn(learner, batches("shared", per_task=1, tasks=(task,)))
        expected = weights(learner.nets[like]) if clone else before
        assert all(map(torch.allclose, weights(learner.nets[task]), expected))
    # One that comes back goes on with its own.
    with torch.no_grad():
        learner.nets[0][0].weight.fill_(7)
    learn(learner, batches("shared", per_task=1, tasks=(0,)))
    assert torch.allclose(weights(learner.nets[0])[0], torch.tensor(7.0))


@pytest.mark.parametrize("kind", KINDS)
def test_multimodals_other_input_layers_get_no_update(kind: str) -> None:
    learner = make("multimodal", kind)
    for task in (1, 0, 2):
        before, shared = [weights(layer) for layer in learner.model.inputs], weights(learner.model.shared)
        learn(learner, batches(kind, per_task=2, tasks=(task,)))
        assert [same(weights(layer), was) for layer, was in zip(learner.model.inputs, before, strict=True)] == [
            other != task for other in range(3)
        ]
        assert not same(weights(learner.model.shared), shared)


# ---- agem ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_agems_projected_gradient_does_not_conflict(kind: str) -> None:
    learner = make("agem", kind, memory_batch=10**6)  # draws all there is: the constraint is known
    learn(learner, batches(kind, tasks=(0,)))
    met = 0
    for x, y, task in batches(kind, tasks=(1,)):
        old_x, old_y = learner.agem.memory.examples(0)
        reference = torch.autograd.grad(learner.loss(old_x, old_y, 0), list(learner.model.parameters()))
        learner.observe(x, y, task)
        r = torch.cat([grad.flatten() for grad in reference]).double()
        g = torch.cat([p.grad.flatten() for p in learner.model.parameters()]).double()
        assert r @ g >= -1e-5 * r.norm() * g.norm()
        met += bool(learner.agem.last.violations.any())
    assert met > 0


# ---- joint -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [7, 10])
def test_joint_sees_every_example_exactly_once_per_epoch(kind: str, batch_size: int) -> None:
    stream = digits(kind)
    seen: list[tuple[bytes, int, int]] = []
    mixed = sizes = 0

    class Watched(LEARNERS["joint"]):  # type: ignore[name-defined]
        def observe(self, x, y, task):
            nonlocal mixed, sizes
            mixed += len(task.unique()) > 1
            sizes += 1
            seen.extend(zip((row.numpy().tobytes() for row in x), y.tolist(), task.tolist(), strict=True))

    generator = torch.Generator().manual_seed(0)
    record = learn_stream(
        Watched(stream_info(kind), CPU, Watched.Config(lr=0.1)),
        stream,
        make_schedule(stream, batch_size, epochs=2),
        eval_every=1000,
        generator=generator,
    )
    expected = []
    for task in range(3):
        for x, y in stream.batches(task, 1, 1, torch.Generator()):
            expected.append((x[0].numpy().tobytes(), y.item(), task))
    half = len(seen) // 2
    assert sorted(seen[:half]) == sorted(seen[half:]) == sorted(expected)
    assert seen[:half] != seen[half:]
    assert sizes == 2 * 3 * -(-200 // batch_size)
    assert mixed > 0.8 * sizes
    assert record.R.shape == (3, 3)


def test_sizes_of_mixed_batches() -> None:
    stream = digits("shared")
    sizes = {len(y) for _, y, _ in joint_batches(stream, make_schedule(stream, 7, 1), torch.Generator())}
    assert sizes == {6, 7}


@pytest.mark.parametrize("kind", KINDS)
def test_joints_loss_is_the_mean_over_the_tasks_own_classes(kind: str) -> None:
    joint = make("joint", kind)
    stream = digits(kind)
    x, y, task = next(joint_batches(stream, make_schedule(stream, 10, 1), torch.Generator().manual_seed(2)))
    assert len(task.unique()) == 3
    losses = [F.cross_entropy(joint.logits(x[i : i + 1], k), y[i : i + 1]) for i, k in enumerate(task.tolist())]
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(joint.model.parameters()))
    joint.observe(x, y, task)
    for p, grad in zip(joint.model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)
