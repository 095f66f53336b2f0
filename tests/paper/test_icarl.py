"""iCaRL on real digits: herding, the budget, the nearest mean of exemplars, distillation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from utils.learning import KINDS, accuracy, batches, learn, make, stream_info

from gem_fast.memory.herding import herding_order
from gem_fast.paper.errors import InputError


def plain_herding(features: Tensor, n: int) -> list[int]:
    """Algorithm 4 as it is written."""
    mean = features.mean(0)
    chosen: list[int] = []
    for k in range(1, min(n, len(features)) + 1):
        costs = []
        for i, row in enumerate(features):
            total = sum((features[j] for j in chosen), torch.zeros_like(mean))
            costs.append(float("inf") if i in chosen else (mean - (row + total) / k).norm().item())
        chosen.append(costs.index(min(costs)))
    return chosen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 7, 500])
def test_herding(kind: str, n: int) -> None:
    learner = learn(make("icarl", kind), batches(kind, tasks=(0,)))
    x, y = learner.current_task.examples()
    features = learner.all_outputs(x[y == 1]).detach().double()
    assert herding_order(features, n).tolist() == plain_herding(features, n)
    assert len(herding_order(features, n)) == min(n, len(features))


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_is_kept_and_shared(kind: str) -> None:
    learner = make("icarl", kind, memory=60)
    for task in range(3):
        before = learner.current_exemplars()
        learn(learner, batches(kind, tasks=(task,)))
        chosen = learner.current_exemplars()
        classes = sum(len(stream_info(kind).outputs[seen]) for seen in range(task + 1))
        assert len(chosen) == classes
        assert sum(map(len, chosen.values())) <= 60
        _, y = learner.current_task.examples()
        for (of_task, label), kept in chosen.items():
            if of_task == task:
                assert len(kept) == min(60 // classes, int((y == label).sum()))
            else:
                assert kept.equal(before[of_task, label][: 60 // classes])  # the first chosen stay
    assert sum(len(kept) for kept, _ in learner.exemplars.by_class.values()) <= 60


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_is_the_nearest_mean_of_exemplars(kind: str) -> None:
    learner = learn(make("icarl", kind), batches(kind))
    learner.train(False)
    x = batches(kind, per_task=1, tasks=(1,))[0][0]
    chosen = learner.current_exemplars()
    for task in range(3):
        logits = learner.predict(x, task)
        for i, row in enumerate(x):
            feature = learner.all_outputs(row[None])[0]
            distances = [
                (feature - learner.all_outputs(chosen[task, label]).mean(0)).norm()
                for label in range(len(stream_info(kind).outputs[task]))
            ]
            torch.testing.assert_close(logits[i], -torch.stack(distances), rtol=1e-4, atol=1e-5)


def test_a_task_not_seen_yet_and_a_class_without_examples() -> None:
    learner = make("icarl", "shared")
    x = torch.rand(4, 784)
    assert not learner.predict(x, 1).any()
    learner.observe(x, torch.tensor([1, 1, 2, 2]), 0)
    assert set(learner.predict(x, 0).argmax(1).tolist()) <= {1, 2}
    assert learner.predict(x, 0).isfinite().all()
    assert not learner.predict(x, 1).any()


def test_examples_seen_again_are_candidates_once() -> None:
    learner = make("icarl", "shared")
    for _ in range(3):
        learn(learner, batches("shared", per_task=2, tasks=(0,)))
    learn(learner, batches("shared", per_task=2, tasks=(1, 0)))
    for kept in learner.current_exemplars().values():
        assert len(kept.unique(dim=0)) == len(kept)
    assert {task for task, _ in learner.current_exemplars()} == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_distillation(kind: str) -> None:
    learner = learn(make("icarl", kind, strength=2.0), batches(kind))
    past = learner._past_exemplars(2)
    classes = [c for c in learner.exemplars.by_class if c[0] != 2]
    state = learner.generator.get_state()
    loss = learner._distillation(past)
    learner.generator.set_state(state)
    sizes = torch.tensor([len(learner.exemplars.by_class[c][0]) for c in classes])
    rows = (torch.rand(len(sizes), generator=learner.generator, dtype=torch.float64) * sizes).long().tolist()
    expected = torch.zeros(())
    for c, row in zip(classes, rows, strict=True):
        x, target = (part[row : row + 1] for part in learner.exemplars.by_class[c])
        outputs = stream_info(kind).outputs[c[0]]
        old = target[:, outputs.start : outputs.stop].softmax(1)
        new = learner.logits(x, c[0]).softmax(1)
        expected = expected + (old * (old / new).log()).sum() / len(outputs)
    torch.testing.assert_close(loss, expected)

    def gradients(strength: float) -> list[Tensor]:
        learner.generator.set_state(state)
        learner.model.zero_grad()
        x, y, task = batches(kind, per_task=1, tasks=(2,))[0]
        (F.cross_entropy(learner.logits(x, task), y) + strength * learner._distillation(past)).backward()
        return [p.grad.clone() for p in learner.model.parameters()]

    grads = gradients(2.0)
    learner.generator.set_state(state)
    learner.observe(*batches(kind, per_task=1, tasks=(2,))[0])
    for p, grad in zip(learner.model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_targets_are_the_outputs_when_the_last_task_ended() -> None:
    learner = learn(make("icarl", "shared"), batches("shared", tasks=(0, 1)))
    expected = {c: learner.all_outputs(kept).detach() for c, kept in learner.current_exemplars().items()}
    learn(learner, batches("shared", tasks=(2,)))
    for c, (_, targets) in learner.exemplars.by_class.items():
        torch.testing.assert_close(targets, expected[c])


@pytest.mark.parametrize("kind", KINDS)
def test_exemplars_keep_old_tasks_alive(kind: str) -> None:
    icarl, single = (learn(make(name, kind), batches(kind)) for name in ("icarl", "single"))
    assert accuracy(icarl, kind, 0) > accuracy(single, kind, 0)


def test_a_budget_too_small() -> None:
    with pytest.raises(InputError, match="--memory must be at least one exemplar of each class, 30 here, got 29"):
        make("icarl", "shared", memory=29)
