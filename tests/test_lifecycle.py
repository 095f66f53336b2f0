"""A hook's life: attached once, detached, collected, copied, threaded, forked."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from utils.asserts import assert_same_bits
from utils.models import mlp, stream
from utils.training import sgd, train, weights

from gem_fast import AGEM, GEM, EpisodicMemory, project_


def test_detach_twice() -> None:
    model = mlp()
    optimizer = sgd(model)
    gem = GEM(model, optimizer)
    assert gem.attached
    for _ in range(2):
        gem.detach()
        assert not gem.attached
    train(model, optimizer, gem, stream(2))
    assert gem.last is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_with_block_detaches_at_its_end(fails: bool) -> None:
    model = mlp()
    optimizer = sgd(model)
    try:
        with GEM(model, optimizer) as gem:
            train(model, optimizer, gem, stream(2))
            assert gem.last is not None
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert not gem.attached
    with pytest.raises(RuntimeError, match="must be attached to be used in a with block, got a detached one"), gem:
        pass


def test_one_hook_per_optimizer() -> None:
    model = mlp()
    optimizer, other = sgd(model), sgd(model)
    gem = GEM(model, optimizer)
    for rule in (GEM, AGEM):
        with pytest.raises(RuntimeError, match=r"must have no hook of gem_fast yet.*call detach\(\) on the first"):
            rule(model, optimizer)
    GEM(model, other)
    gem.detach()
    second = GEM(model, optimizer)
    gem.detach()  # of the first one, and so not of the second
    assert second.attached
    with pytest.raises(RuntimeError, match="must have no hook"):
        GEM(model, optimizer)


def test_a_constructor_that_fails_attaches_nothing() -> None:
    model = mlp()
    optimizer = sgd(model)
    for options in ({"memory_batch": 0}, {"seed": "one"}, {"margin": -1.0}):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            AGEM(model, optimizer, **options)
    assert GEM(model, optimizer).attached


@pytest.mark.parametrize("keep", ["nothing", "hook", "optimizer"])
def test_collected_with_the_optimizer(keep: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    gem = GEM(model, optimizer)
    train(model, optimizer, gem, stream(2))
    objects = {"model": model, "optimizer": optimizer, "hook": gem}
    kept = objects.get(keep)
    dead = {name: weakref.ref(value) for name, value in objects.items()}
    del model, optimizer, gem, objects
    gc.collect()
    # The optimizer holds the hook, the hook the model; and no one else any of them.
    alive = {"nothing": [], "hook": ["model", "hook"], "optimizer": ["model", "optimizer", "hook"]}[keep]
    assert [name for name, ref in dead.items() if ref() is not None] == alive
    if keep == "hook":
        assert not kept.attached
        kept.detach()


def test_steps_leave_no_garbage() -> None:
    model = mlp()
    optimizer = sgd(model)
    gem = GEM(model, optimizer)
    train(model, optimizer, gem, stream(2))
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(20):
            x, y, _ = next(stream(1))
            train(model, optimizer, gem, [(x, y, 1)])
        assert len(gc.get_objects()) - before < 20
    finally:
        gc.enable()


@pytest.mark.parametrize("rule", [GEM, AGEM])
def test_copies_and_pickles_are_refused(rule: type[GEM]) -> None:
    model = mlp()
    gem = rule(model, sgd(model))
    for call in (copy.copy, copy.deepcopy, pickle.dumps, lambda hook: torch.save(hook, io.BytesIO())):
        with pytest.raises(TypeError, match=rf"^{rule.__name__} cannot be copied or pickled: .* state_dict\(\)$"):
            call(gem)


def test_a_copied_model_and_optimizer_have_no_hook() -> None:
    model = mlp()
    optimizer = sgd(model)
    gem = GEM(model, optimizer)
    twin, twins_optimizer = copy.deepcopy((model, optimizer))
    twins = GEM(twin, twins_optimizer)
    twins.load_state_dict(gem.state_dict())
    train(model, optimizer, gem, stream(3))
    train(twin, twins_optimizer, twins, stream(3))
    for a, b in zip(weights(model), weights(twin), strict=True):
        assert_same_bits(a, b)


def test_threads_train_as_if_alone() -> None:
    def run(seed: int, results: dict[int, list[Tensor]]) -> None:
        model = mlp()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        optimizer = sgd(model)
        train(model, optimizer, GEM(model, optimizer, memory=EpisodicMemory(per_task=9)), stream(5, 12))
        results[seed] = weights(model)

    alone: dict[int, list[Tensor]] = {}
    together: dict[int, list[Tensor]] = {}
    for seed in range(4):
        run(seed, alone)
    threads = [threading.Thread(target=run, args=(seed, together)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in alone:
        for a, b in zip(alone[seed], together[seed], strict=True):
            assert_same_bits(a, b)


class Examples(Dataset[tuple[Tensor, int]]):
    """Answers from a worker process, in which the operators work as well."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        project_([torch.ones(6)], -torch.ones(2, 6))
        return self.x[i], int(self.y[i])


# Newer Pythons warn of every fork of a process with threads, such as torch's own.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_workers_load_the_data() -> None:
    batches = list(stream(3))
    ends = []
    for workers in (0, 2):
        torch.manual_seed(0)
        model = mlp()
        optimizer = sgd(model)
        with GEM(model, optimizer) as gem:
            for task in range(3):
                mine = [batch for batch in batches if batch[2] == task]
                examples = Examples(torch.cat([x for x, _, _ in mine]), torch.cat([y for _, y, _ in mine]))
                context = "fork" if workers else None
                loader = DataLoader(examples, batch_size=4, num_workers=workers, multiprocessing_context=context)
                train(model, optimizer, gem, ((x, y, task) for x, y in loader))
        ends.append(weights(model))
    for a, b in zip(*ends, strict=True):
        assert_same_bits(a, b)
