"""Descriptors of tasks in the hook: given once or with batches, kept in states, refused where they cannot be right."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from utils.asserts import assert_same_bits
from utils.descriptor_models import FromTwo, Hypernetwork, Modulated, ModulatedHeads
from utils.models import mlp, stream
from utils.states import through_a_file
from utils.training import train

from gem_fast import AGEM, GEM, EpisodicMemory, Loop
from gem_fast.containers import map_tensors

DESCRIPTORS = {task: torch.randn(4, generator=torch.Generator().manual_seed(task)) for task in range(4)}
X, Y = torch.randn(5, 6), torch.arange(5) % 3


class InTasksPlace(Modulated):
    """Takes the descriptor as its `task`."""

    def forward(self, x: Tensor, task: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, task)


def attached(model: nn.Module, rule: type[GEM] = GEM, **options: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, rule(model, optimizer, memory=EpisodicMemory(per_task=6), **options)


def train_told(
    model: nn.Module, optimizer: Any, gem: GEM, tasks: int = 4, told: Any = DESCRIPTORS, observed: Any = None
) -> None:
    """told: what the model is called with; observed: what the hook is given with each batch, nothing by default."""
    batches = ((*batch, *([] if observed is None else [observed[batch[2]]])) for batch in stream(tasks, batches=3))
    train(model, optimizer, gem, batches, loss_of=lambda x, y, task: F.cross_entropy(model(x, told[task]), y))


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("rule", [GEM, AGEM])
@pytest.mark.parametrize("make", [Modulated, Hypernetwork, InTasksPlace])
def test_a_mapping_and_descriptors_with_the_batches_train_the_same(make: Any, rule: type[GEM]) -> None:
    first = make()
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    optimizer, gem = attached(first, rule, descriptors=DESCRIPTORS)
    train_told(first, optimizer, gem)
    optimizer, gem = attached(second, rule)
    train_told(second, optimizer, gem, observed=DESCRIPTORS)
    assert gem.last is not None
    assert_same_bits(weights(first), weights(second))
    # With the first batch of each task is enough.
    optimizer, gem = attached(third, rule)
    once = dict.fromkeys(DESCRIPTORS)
    for x, y, task in stream(4, batches=3):
        optimizer.zero_grad()
        F.cross_entropy(third(x, DESCRIPTORS[task]), y).backward()
        gem.observe(x, y, task, DESCRIPTORS[task] if task in once else None)
        once.pop(task, None)
        optimizer.step()
    assert_same_bits(weights(first), weights(third))


@pytest.mark.parametrize("options", [{}, {"memory_batch": 3}, {"engine": Loop()}], ids=["exact", "sampled", "loop"])
def test_constraints_are_the_gradients_with_each_tasks_own_descriptor(options: Any) -> None:
    model = Modulated().double()
    _, gem = attached(model, descriptors=DESCRIPTORS, **options)
    for x, y, task in stream(3, dtype=torch.float64):
        gem.observe(x, y, task)
    [constraints, sample], parameters = gem.constraints(), list(model.parameters())
    G = gem._task_gradients(gem.objective, constraints, parameters, sample).G
    if sample is not None:
        constraints = sample.of(constraints)
    for row, [batch] in zip(G, constraints, strict=True):
        loss = F.cross_entropy(model(batch.x, DESCRIPTORS[batch.task].double()), batch.y)
        expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)])
        assert torch.allclose(row, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"memory_batch": 3}, {"engine": Loop()}], ids=["exact", "sampled", "loop"])
@pytest.mark.parametrize("make", [Modulated, Hypernetwork, InTasksPlace])
def test_a_step_in_one_call_is_the_same(make: Any, options: Any) -> None:
    one = make().double()
    other = copy.deepcopy(one)
    optimizer, gem = attached(one, **options)
    _, stepped = attached(other, **options)
    for x, y, task in stream(4, batches=3, dtype=torch.float64):
        optimizer.zero_grad()
        F.cross_entropy(one(x, DESCRIPTORS[task].double()), y).backward()
        gem.observe(x, y, task, DESCRIPTORS[task])
        optimizer.step()
        stepped.step(x, y, task, DESCRIPTORS[task])
    assert torch.allclose(weights(one), weights(other), rtol=1e-9, atol=1e-9)


def test_they_follow_the_models_dtype_and_are_converted_once() -> None:
    model = Modulated()
    _, gem = attached(model, descriptors={0: torch.ones(4, dtype=torch.float64), 1: DESCRIPTORS[1]})
    gem.observe(X, Y, 0)
    gem.current_task = 1
    before = gem.constraints()[0][0][0].descriptor
    assert before.dtype == torch.float32
    assert gem.constraints()[0][0][0].descriptor is before
    model.double()
    assert gem.constraints()[0][0][0].descriptor.dtype == torch.float64


def test_integers_and_constants_of_a_nest_stay() -> None:
    told = {"angle": torch.ones(2).double(), "text": {"tokens": torch.arange(5), "is_short": True}}
    model = FromTwo()
    _, gem = attached(model, descriptors={0: told})
    gem.observe(X, Y, 0)
    gem.current_task = None
    got = gem.constraints()[0][0][0].descriptor
    assert got["angle"].dtype == torch.float32
    assert got["text"]["tokens"].dtype == torch.int64
    assert got["text"]["is_short"] is True


def test_what_the_hook_keeps_is_a_copy() -> None:
    told = torch.ones(4)
    _, gem = attached(Modulated())
    gem.observe(X, Y, 0, told)
    told.zero_()
    gem.current_task = None
    assert bool((gem.constraints()[0][0][0].descriptor == 1).all())
    with pytest.raises(ValueError, match="descriptor must be the same for a task at all times, got another one for 0"):
        gem.observe(X, Y, 0, told)


def test_observed_in_inference_mode() -> None:
    model = Modulated()
    optimizer, gem = attached(model)
    with torch.inference_mode():
        gem.observe(X.clone(), Y.clone(), 0, torch.ones(4))
        gem.observe(X.clone(), Y.clone(), 0, torch.ones(4))
    train_told(
        model,
        optimizer,
        gem,
        told=dict.fromkeys(range(4), torch.ones(4)),
        observed=dict.fromkeys(range(4), torch.ones(4)),
    )


# ---- the model's side ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"forward": lambda model, x, descriptor: model(x, descriptor)}], ids=["", "forward"]
)
def test_which_argument_it_is(options: Any) -> None:
    _, gem = attached(Modulated(), descriptors=DESCRIPTORS, **options)
    assert (gem.objective.descriptor_name, gem.objective.pass_task) == ("descriptor", False)


def test_in_the_tasks_place() -> None:
    def forward(model: nn.Module, x: Tensor, task: Tensor) -> Tensor:
        return model(x, task)

    for model, options in ((InTasksPlace(), {}), (Modulated(), {"pass_task": True, "forward": forward})):
        _, gem = attached(model, descriptors=DESCRIPTORS, **options)
        assert gem.objective.descriptor_name == "task"
        assert torch.equal(gem.objective.output(X, 1, DESCRIPTORS[1]), model(X, DESCRIPTORS[1]))


def test_a_model_that_works_without_one_gets_it_for_some_tasks() -> None:
    model = ModulatedHeads()
    _, gem = attached(model)
    for task in range(3):
        gem.observe(X, Y, task, DESCRIPTORS[1] if task == 1 else None)
    constraints, _ = gem.constraints()
    assert [batch.descriptor is None for [batch] in constraints] == [True, False]
    output = gem.objective.output(X, 1, DESCRIPTORS[1])
    assert torch.equal(output, model(X, 1, DESCRIPTORS[1]))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "descriptor", "kind", "message"),
    [
        (Modulated(), None, ValueError, "descriptor must be given for each task once, got none for task 7"),
        (mlp(), torch.ones(4), ValueError, "descriptor must be None for a model whose forward has no parameter"),
        (Modulated(), "an angle", TypeError, "descriptor must be a dense tensor or a nest of these, got str"),
        (Modulated(), [0.5, 1.0], TypeError, r"descriptor\[0\] must be a dense tensor or a nest of these, got float"),
        (Modulated(), {"angle": 0.5}, TypeError, "descriptor must be a dense tensor or a nest of these, got no tensor"),
        (Modulated(), torch.ones(4).to_sparse(), TypeError, "descriptor must be a dense tensor or a nest of these"),
        (Modulated(), torch.ones(4, requires_grad=True), ValueError, "descriptor must not require a gradient"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_changes(
    model: nn.Module, descriptor: Any, kind: type[Exception], message: str
) -> None:
    _, gem = attached(model)
    with pytest.raises(kind, match=message):
        gem.observe(X, Y, 7, descriptor)
    assert gem.memory.tasks == []
    assert gem.current_task is None
    if descriptor is not None:
        with pytest.raises(kind, match=message):
            attached(copy.deepcopy(model), descriptors={7: descriptor})


def test_a_batch_that_the_memory_refuses_leaves_no_descriptor() -> None:
    _, gem = attached(Modulated())
    with pytest.raises(ValueError, match="same number of examples"):
        gem.observe(X, Y[:2], 0, torch.zeros(4))
    gem.observe(X, Y, 0, torch.ones(4))


def test_the_mapping_is_one() -> None:
    with pytest.raises(TypeError, match="descriptors must be a mapping from tasks to tensors, got list"):
        attached(Modulated(), descriptors=[torch.ones(4)])


def test_a_task_that_is_missing_where_descriptors_stand_in_the_tasks_place() -> None:
    _, gem = attached(InTasksPlace(), descriptors={0: torch.ones(4)})
    gem.observe(X, Y, 0)
    with pytest.raises(ValueError, match="descriptor must be given for each task once, got none for task 1"):
        gem.observe(X, Y, 1)


plain = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.int64, torch.float32]),
)
nests = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3), st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=50)
@given(one=nests, other=nests)
def test_any_other_nest_is_another_descriptor(one: Any, other: Any) -> None:
    def described(x: Any) -> Any:
        if isinstance(x, Tensor):
            return tuple(x.shape)
        return {k: described(v) for k, v in x.items()} if isinstance(x, dict) else [described(v) for v in x]

    _, gem = attached(Modulated())
    gem.observe(X, Y, 0, one)
    gem.observe(X, Y, 0, map_tensors(torch.clone, one))
    if described(one) == described(other):
        gem.observe(X, Y, 0, other)
    else:
        with pytest.raises(ValueError, match="the same for a task at all times"):
            gem.observe(X, Y, 0, other)


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Modulated, Hypernetwork])
def test_a_resumed_run_has_the_same_bits(make: Any) -> None:
    model = make()
    optimizer, gem = attached(model, memory_batch=3)
    train_told(model, optimizer, gem, tasks=3, observed=DESCRIPTORS)
    resumed = copy.deepcopy(model)
    other_optimizer, other = attached(resumed, memory_batch=3)
    other.load_state_dict(through_a_file(gem.state_dict()))
    for parts in ((model, optimizer, gem), (resumed, other_optimizer, other)):
        for x, y, task in stream(2, batches=2):
            parts[1].zero_grad()
            F.cross_entropy(parts[0](x, DESCRIPTORS[task]), y).backward()
            parts[2].observe(x, y, task)  # its descriptor is known
            parts[1].step()
    assert_same_bits(weights(model), weights(resumed))


def test_a_state_takes_the_place_of_what_came_before() -> None:
    _, gem = attached(Modulated())
    before = gem.state_dict()
    gem.observe(X, Y, 0, DESCRIPTORS[0])
    state = through_a_file(gem.state_dict())
    gem.load_state_dict(before)
    gem.observe(X, Y, 0, DESCRIPTORS[1])
    assert torch.equal(gem._descriptors.of(0), DESCRIPTORS[1])
    gem.load_state_dict(state)
    assert torch.equal(gem._descriptors.of(0), DESCRIPTORS[0])


def of(task: Any, descriptor: Any) -> dict[str, Any]:
    return {"task": task, "descriptor": descriptor}


ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("model", "options", "descriptors", "message"),
    [
        (Modulated(), {}, None, "descriptors of the state must be a list, got NoneType"),
        (Modulated(), {}, [{"task": 0}], "a descriptor of the state must have the keys task, descriptor, got task"),
        (Modulated(), {}, [of(0, "an angle")], "descriptor must be a dense tensor or a nest of these, got str"),
        (Modulated(), {}, [of([], ONES)], "task must be a number, string, None or a tuple of these"),
        (Modulated(), {}, [of(0, torch.ones(1).expand(4))], "must be a dense tensor, got an expanded one"),
        (Modulated(), {}, [of(0, ONES), of(0, -ONES)], "tasks with a descriptor in the state must differ, got 0 twice"),
        (Modulated(), {"descriptors": DESCRIPTORS}, [of(0, ONES)], "the descriptor of task 0 must be the same as in"),
        (mlp(), {}, [of(0, ONES)], "the model must take a descriptor as in the state, got one without"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    model: nn.Module, options: Any, descriptors: Any, message: str
) -> None:
    model = copy.deepcopy(model)
    _, gem = attached(model, **options)
    state = gem.state_dict()
    told = [] if isinstance(model, nn.Sequential) else [torch.full((4,), 2.0)]
    gem.observe(X, Y, 9, *told)
    with pytest.raises(ValueError, match=message):
        gem.load_state_dict({**state, "descriptors": descriptors})
    assert gem.memory.tasks == [9]
    assert (gem._descriptors.of(9) is None) == (not told)
