"""memory_batch and refresh_every: which examples and which rows of G count in a step."""

import copy
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from utils.engines import loop
from utils.models import MultiHead, mlp, stream
from utils.training import train

from gem_fast import GEM, Batch, EpisodicMemory, Fused, Loop, RowGradients, Sample
from gem_fast.sampling import sample_all, sample_each

COUNTS = st.lists(st.integers(1, 20), min_size=1, max_size=6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(COUNTS, st.integers(1, 25), st.integers(0, 5))
def test_each_task_gives_its_own_examples_without_replacement(counts: list[int], size: int, seed: int) -> None:
    sample = sample_each(counts, size, generator(seed))
    assert sample.sizes == [min(size, n) for n in counts]
    start = 0
    for n, mine in zip(counts, sample.positions.split(sample.sizes), strict=True):
        assert len(mine.unique()) == len(mine)
        assert ((mine >= start) & (mine < start + n)).all()
        start += n


@given(COUNTS, st.integers(1, 60), st.integers(0, 5))
def test_all_tasks_together_give_so_many(counts: list[int], size: int, seed: int) -> None:
    drawn = sample_all(counts, size, generator(seed))
    assert sum(map(len, drawn)) == min(size, sum(counts))
    for n, mine in zip(counts, drawn, strict=True):
        assert len(mine.unique()) == len(mine)
        assert ((mine >= 0) & (mine < n)).all()


def test_every_example_is_as_likely_as_any_other() -> None:
    draws, rng = 3000, generator()
    counted = Counter(int(i) for _ in range(draws) for i in sample_each([8, 5], 2, rng).positions)
    for example in range(13):
        expected = draws * 2 / (8 if example < 8 else 5)
        assert abs(counted[example] - expected) < 6 * expected**0.5


@pytest.mark.parametrize("heads", [False, True])
def test_rows_are_those_of_the_sample(heads: bool) -> None:
    model = (MultiHead(4) if heads else mlp()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=20), memory_batch=3, seed=5)
    twin = generator(5)
    for x, y, task in stream(4, dtype=torch.float64):
        optimizer.zero_grad()
        output = model(x, task) if heads else model(x)
        F.cross_entropy(output, y).backward()
        g = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
        )
        gem.observe(x, y, task)
        past = gem.past_tasks
        rows = []
        if past:
            examples = [gem.memory.examples(k) for k in past]
            sample = sample_each([len(a) for a, _ in examples], 3, twin)
            constraints = [[Batch(k, *pair)] for k, pair in zip(past, examples, strict=True)]
            engine = loop(model, pass_task=heads)
            rows = engine(constraints, list(model.parameters()), sample=sample).G
        optimizer.step()
        if past:
            assert gem.last is not None
            assert torch.allclose(gem.last.q, rows @ g, rtol=1e-10, atol=1e-14)


def test_all_examples_count_by_default_and_where_there_are_fewer() -> None:
    weights = []
    for options in ({}, {"memory_batch": 1000}):
        torch.manual_seed(0)
        model = mlp(torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=20), **options)
        train(model, optimizer, gem, stream(3, dtype=torch.float64))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(weights[0], weights[1], rtol=1e-10, atol=1e-14)


# ---- refresh_every ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9))
def test_every_row_is_stale_once_in_r_steps(t: int, every: int) -> None:
    parameters = list(mlp().parameters())
    rows = RowGradients(every)
    past: list[object] = list(range(t))

    def stale(*step: Any) -> slice:
        rows.begin_step(*step)
        return rows.stale

    assert stale(past, parameters) == slice(0, t)
    assert len(rows.G) == t
    turns = Counter(k for _ in range(every) for k in range(*stale(past, parameters).indices(t)))
    assert turns == Counter(range(t))
    # Another task, or the parameters changed: what is kept is of no use.
    assert stale([*past, "new"], parameters) == slice(0, t + 1)
    assert stale([*past, "new"], parameters[1:]) == slice(0, t + 1)


@pytest.mark.parametrize("make", [Fused, Loop])
def test_rows_that_are_not_stale_stay_as_they_were(make: type[Fused | Loop]) -> None:
    model = mlp(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    computed: list[tuple[slice, torch.Tensor]] = []

    class Spied(make):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any) -> RowGradients:
            G = super().__call__(*args)
            computed.append((G.stale, G.G.clone()))
            return G

    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=20), engine=Spied(refresh_every=3))
    train(model, optimizer, gem, stream(5, batches=6, dtype=torch.float64))
    changes = [
        ({k for k in range(len(now)) if not now[k].equal(before[k])}, set(range(stale.start, stale.stop)))
        for (_, before), (stale, now) in itertools.pairwise(computed)
        if len(before) == len(now)
    ]
    assert all(changed <= stale for changed, stale in changes)
    assert any(changed and changed < set(range(4)) for changed, _ in changes)


@pytest.mark.parametrize(("memory_batch", "refresh_every"), [(3, 1), (None, 3), (2, 2)])
@pytest.mark.parametrize("make", [Fused, Loop])
def test_a_resumed_hook_goes_on_with_the_same_bits(
    memory_batch: int | None, refresh_every: int, make: type[Fused | Loop]
) -> None:
    batches = list(stream(4, batches=5))

    def start() -> tuple[torch.nn.Module, torch.optim.Optimizer, GEM]:
        torch.manual_seed(0)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        memory, engine = EpisodicMemory(per_task=9), make(refresh_every=refresh_every)
        return model, optimizer, GEM(model, optimizer, memory=memory, memory_batch=memory_batch, engine=engine)

    whole, halves, resumed = start(), start(), start()
    train(*whole, batches)
    train(*halves, batches[:13])
    resumed[0].load_state_dict(halves[0].state_dict())
    resumed[2].load_state_dict(copy.deepcopy(halves[2].state_dict()))
    train(*resumed, batches[13:])
    for one, other in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert one.equal(other)


def test_bad_options() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="memory_batch must be at least 1 example, got 0"):
        GEM(model, optimizer, memory_batch=0)
    with pytest.raises(ValueError, match="refresh_every must be at least 1 step, got 0"):
        Loop(refresh_every=0)
    assert isinstance(sample_each([2], 1, generator()), Sample)
