"""GEM and A-GEM in Avalanche: streams of several kinds, checkpoints, and Avalanche's own plugin beside ours."""

import copy
import pickle
import sys
import unittest
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import AvalancheDataset, TaskLabels, _make_taskaware_tensor_classification_dataset
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import TextLogger
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from avalanche.training import Naive
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins import GEMPlugin as AvalancheGEMPlugin
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from utils.asserts import assert_same_bits

import gem_fast
from gem_fast.integrations.avalanche import AGEM, GEM, AGEMPlugin, GEMPlugin
from gem_fast.paper.data import MNIST_5K, load_data

N, FEATURES, CLASSES = 40, 8, 3
# An evaluator without loggers is what most of these tests want.
pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")
PATTERNS = {"patterns_per_exp": 16}


class MultiHead(MultiTaskModule):
    """One hidden layer, and one head per task label."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 12)
        self.heads = MultiHeadClassifier(12, CLASSES, masking=False)

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        return self.heads(self.hidden(x).relu(), task_labels)


def single_head() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def dataset(seed: int, labels: list[int]) -> AvalancheDataset:
    """Each experience has a linear rule of its own; its examples have the task labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, FEATURES, generator=generator)
    y = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
    task_labels = TaskLabels([labels[i % len(labels)] for i in range(N)])
    data = _make_taskaware_tensor_classification_dataset(x, y, targets=y.tolist())
    return data.update_data_attribute(name="targets_task_labels", new_value=task_labels)


def experiences(labels: list[list[int]]) -> list:
    data = [dataset(seed, own) for seed, own in enumerate(labels)]
    return list(with_classes_timeline(with_task_labels(benchmark_from_datasets(train=data))).train_stream)


def strategy(kind: type, model: nn.Module, **options: object) -> object:
    return kind(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=10,
        evaluator=EvaluationPlugin(),
        **options,
    )


def plugin_of(made: object) -> GEMPlugin | AGEMPlugin:
    [plugin] = [x for x in made.plugins if isinstance(x, (GEMPlugin, AGEMPlugin))]
    return plugin


@pytest.mark.parametrize("kind", [GEM, AGEM])
@pytest.mark.parametrize(
    ("model", "labels"),
    [(single_head, [[0], [0], [0]]), (MultiHead, [[0], [1], [2]]), (MultiHead, [[0, 1], [1, 2], [0, 2]])],
    ids=["one head", "several heads", "several labels in one experience"],
)
def test_streams(kind: type, model: type, labels: list[list[int]], caplog: pytest.LogCaptureFixture):
    made = strategy(kind, model(), **PATTERNS)
    for number, experience in enumerate(experiences(labels)):
        made.train(experience)
        assert (plugin_of(made).hook.last is None) == (number == 0)
    memory = plugin_of(made).hook.memory
    assert memory.tasks == [0, 1, 2]
    assert len(memory) == 3 * 16
    assert not caplog.records


@pytest.mark.parametrize("labels", [[[0], [1], [2]], [[0, 1], [1, 2], [0, 2]]], ids=["one label", "several labels"])
def test_several_heads_in_one_pass_train_as_one_backward_per_experience_does(labels: list[list[int]]):
    base = MultiHead()
    made = [
        strategy(Naive, copy.deepcopy(base), plugins=[GEMPlugin(16, 0.5, engine=engine)])
        for engine in ("auto", gem_fast.Loop())
    ]
    for each in made:
        torch.manual_seed(0)
        for experience in experiences(labels):
            each.train(experience)
        assert each.plugins[0].hook.last.v.shape == (2,)
    for mine, other in zip(made[0].model.parameters(), made[1].model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [single_head, MultiHead])
def test_a_step_projects_as_avalanches_plugin_does(model: type):
    """With the same seed; a replayed experience counts as another one in both."""
    stream = experiences([[0], [0], [0]])
    stream = [*stream[:2], stream[0], stream[2]]
    base = model()
    ours = strategy(Naive, base, plugins=[GEMPlugin(16, 0.5, ridge=1e-3)])
    theirs = strategy(Naive, copy.deepcopy(base), plugins=[AvalancheGEMPlugin(16, 0.5)])
    for made in (ours, theirs):
        torch.manual_seed(1)
        for experience in stream:
            made.train(experience)
    hook, plugin = ours.plugins[0].hook, theirs.plugins[0]
    assert hook.past_tasks == [0, 1, 2]
    for task in hook.memory.tasks:
        x, y = hook.memory.examples(task)
        assert_same_bits((x if model is single_head else x[0]), plugin.memory_x[task])
        assert_same_bits(y, plugin.memory_y[task])
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


# ---- Avalanche's GEM on digits ---------------------------------------------------------------------------------------

Task = tuple[Tensor, Tensor]


@cache
def digits() -> Task:
    data = load_data(MNIST_5K)
    return data.train_images.flatten(1).float() / 255, data.train_labels


def digit_tasks(kind: str, seed: int, n: int = 100) -> tuple[list[Task], list[Task]]:
    """Four tasks to train on and to test: with the pixels in an order of their own, or with two classes each."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    sets: tuple[list[Task], list[Task]] = ([], [])
    for task in range(4):
        rows = torch.randperm(len(x), generator=generator)
        pixels = torch.randperm(784, generator=generator) if kind == "permuted" else torch.arange(784)
        if kind == "split":
            rows = rows[y[rows] // 2 == task]
        for out, part in zip(sets, (rows[:n], rows[n : 3 * n]), strict=True):
            out.append((x[part][:, pixels], y[part]))
    return sets


def trained_on_digits(plugins: list[SupervisedPlugin], train: list[Task], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))
    made = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=10,
        plugins=plugins,
        evaluator=EvaluationPlugin(),
    )
    data = [_make_taskaware_tensor_classification_dataset(x, y, targets=y.tolist()) for x, y in train]
    for experience in benchmark_from_datasets(train=data).train_stream:
        made.train(experience)
    return model


@torch.no_grad()
def mean_accuracy(model: nn.Module, tasks: list[Task]) -> float:
    return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in tasks) / len(tasks)


class Steps(AvalancheGEMPlugin):
    """Keeps the weights after each step, and whether the step was projected."""

    def __init__(self) -> None:
        super().__init__(64, 0.5)
        self.weights: list[Tensor] = []
        self.projected: list[bool] = []

    def solve_quadprog(self, g: Tensor) -> Tensor:
        self.projected[-1] = True
        return super().solve_quadprog(g)

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_iteration(strategy, **kwargs)
        self.projected.append(False)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.weights.append(parameters_to_vector(strategy.model.parameters()).detach())


class Beside(SupervisedPlugin):
    """After each step, compares its change of the weights with Avalanche's, and goes on from Avalanche's weights."""

    def __init__(self, theirs: Steps, ours: GEMPlugin) -> None:
        super().__init__()
        self.ours, self.steps = ours, iter(zip(theirs.weights, theirs.projected, strict=True))
        self.differences: list[float] = []

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.before = parameters_to_vector(strategy.model.parameters()).detach()

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        theirs, projected = next(self.steps)
        last = self.ours.hook.last
        if projected == (last is not None and bool(last.violations.any())):
            mine = parameters_to_vector(strategy.model.parameters()).detach()
            self.differences.append(float((mine - theirs).norm() / (theirs - self.before).norm()))
        else:
            assert float(last.q.abs().min()) < 1e-4, "a constraint that holds, or not, by more than rounding"
        vector_to_parameters(theirs, strategy.model.parameters())


@pytest.mark.parametrize("kind", ["permuted", "split"])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_is_avalanches(kind: str, seed: int):
    train, _ = digit_tasks(kind, seed)
    theirs, ours = Steps(), GEMPlugin(64, 0.5, ridge=1e-3)
    trained_on_digits([theirs], train, seed)
    beside = Beside(theirs, ours)
    trained_on_digits([ours, beside], train, seed)
    assert max(beside.differences) < 1e-3
    assert len(beside.differences) > 0.95 * len(theirs.weights)
    assert sum(theirs.projected) > 5


@pytest.mark.parametrize("kind", ["permuted", "split"])
def test_accuracy_agrees_with_avalanches_over_seeds(kind: str):
    """Where one seed's accuracy differs, rounding has decided whether a constraint is violated."""
    made = {
        "theirs": lambda: AvalancheGEMPlugin(64, 0.5),
        "ours with its ridge": lambda: GEMPlugin(64, 0.5, ridge=1e-3),
        "ours": lambda: GEMPlugin(64, 0.5),
    }
    totals = dict.fromkeys(made, 0.0)
    for seed in range(4):
        train, test = digit_tasks(kind, seed)
        for name, plugin in made.items():
            totals[name] += mean_accuracy(trained_on_digits([plugin()], train, seed), test)
    theirs, with_ridge, ours = (total / 4 for total in totals.values())
    assert abs(with_ridge - theirs) < 0.01
    assert ours > theirs - 0.01


def test_avalanches_ridge_leaves_violated_what_is_not_violated_here():
    """1e-3 on the diagonal weighs as much as a past gradient of length 0.03: half of its violation is left."""
    G, g = torch.tensor([[1e-3**0.5, 0.0]]), torch.tensor([-1.0, 1.0])
    plugin = AvalancheGEMPlugin(1, 0.0)
    plugin.G = G
    before = float(G @ g)
    torch.testing.assert_close(float(G @ plugin.solve_quadprog(g)), before / 2)
    gem_fast.project_([g], G, margin=0.0)
    assert float(G @ g) > 1e-6 * before


@pytest.mark.parametrize("kind", [GEM, AGEM])
def test_a_resumed_run_ends_with_the_same_bits(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Without it Avalanche's checkpoints fail with torch 2.14, whatever the strategy (docs/integrations/avalanche.md).
    monkeypatch.setattr(torch.optim, "sgd", sys.modules["torch.optim.sgd"], raising=False)
    stream = experiences([[0], [1], [2]])
    torch.manual_seed(0)
    RNGManager.set_random_seeds(0)
    whole = strategy(kind, MultiHead(), **PATTERNS)
    for number, experience in enumerate(stream):
        whole.train(experience)
        if number == 1:
            save_checkpoint(whole, tmp_path / "checkpoint")
    RNGManager.set_random_seeds(7)
    resumed, start = maybe_load_checkpoint(strategy(kind, MultiHead(), **PATTERNS), tmp_path / "checkpoint")
    assert start == 2
    assert plugin_of(resumed).hook is None
    for experience in stream[start:]:
        resumed.train(experience)
    assert plugin_of(resumed).hook.last is not None
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert_same_bits(a, b)


def test_avalanches_checkpoints_fail_without_that(tmp_path: Path):
    with pytest.raises(pickle.PicklingError):
        save_checkpoint(strategy(Naive, single_head()), tmp_path / "checkpoint")


def test_a_strategy_can_be_copied_and_given_another_optimizer():
    first, second = experiences([[0], [0]])
    made = strategy(GEM, single_head(), **PATTERNS)
    made.train(first)
    other = copy.deepcopy(made)
    other.optimizer = torch.optim.Adam(other.model.parameters())
    before = [p.clone() for p in made.model.parameters()]
    other.train(second)
    assert plugin_of(other).hook.last.v.shape == (1,)
    assert plugin_of(other).hook is not plugin_of(made).hook
    for p, kept in zip(made.model.parameters(), before, strict=True):
        assert_same_bits(p, kept)
    made.optimizer = torch.optim.Adam(made.model.parameters())
    made.train(second)
    assert plugin_of(made).hook.past_tasks == [0]
    assert plugin_of(made).hook.last is not None


def test_evaluation_and_loggers_go_on_working(tmp_path: Path):
    class Steps(SupervisedPlugin):
        count = 0

        def after_update(self, strategy: object, **kwargs: object) -> None:
            self.count += 1

    stream, steps = experiences([[0], [0]]), Steps()
    plugins = [steps]
    model = single_head()
    with (tmp_path / "log").open("w") as log:
        made = GEM(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=F.cross_entropy,
            patterns_per_exp=16,
            train_mb_size=10,
            train_epochs=2,
            plugins=plugins,
            evaluator=EvaluationPlugin(accuracy_metrics(stream=True, epoch=True), loggers=[TextLogger(log)]),
            eval_every=1,
        )
        for experience in stream:
            made.train(experience, eval_streams=[stream])
    assert plugins == [steps], "the list is the user's"
    assert steps.count == 2 * 2 * 4
    assert made.evaluator.get_last_metrics()["Top1_Acc_Stream/eval_phase/train_stream/Task000"] > 0.4
    assert "Top1_Acc_Epoch" in (tmp_path / "log").read_text()


def test_errors_are_the_hooks_own():
    [experience] = experiences([[0]])
    with pytest.raises(ValueError, match="margin must be finite and not negative, got -1"):
        strategy(GEM, single_head(), memory_strength=-1, **PATTERNS).train(experience)


@pytest.mark.filterwarnings("ignore::Warning")  # what Avalanche's own tests warn of
@pytest.mark.parametrize("name", ["test_gem", "test_agem"])
def test_avalanches_own_tests(name: str, monkeypatch: pytest.MonkeyPatch):
    """Which come with its package, as `tests`."""
    from tests.training import test_strategies

    monkeypatch.setattr(test_strategies, "GEM", GEM)
    monkeypatch.setattr(test_strategies, "AGEM", AGEM)
    monkeypatch.setattr(test_strategies.StrategyTest, "fast_test", True, raising=False)
    result = unittest.TestResult()
    test_strategies.StrategyTest(name).run(result)
    assert result.testsRun == 1
    assert not result.errors + result.failures
