"""The networks that take a task's descriptor: what they compute, and one call of them for all past tasks."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from utils.engines import assert_as_the_loop, memory, trained

from gem_fast import Fused, Objective
from gem_fast.paper.models import ModulatedMlp, NamedClasses, mlp
from gem_fast.paper.streams.descriptors import angle_descriptor


def modulated() -> ModulatedMlp:
    model = ModulatedMlp(6, 3, 8, hidden=(5, 4)).double()
    for parameter in model.modulations.parameters():
        nn.init.normal_(parameter)
    return model


def named() -> NamedClasses:
    return NamedClasses(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 8))).double()


CASES = {"modulated": (modulated, (8,)), "named": (named, (3, 8))}


def test_a_modulated_network_starts_as_the_plain_one() -> None:
    torch.manual_seed(0)
    plain = mlp(6, 3)
    torch.manual_seed(0)
    model, x = ModulatedMlp(6, 3, 8), torch.randn(4, 6)
    assert torch.equal(model(x, angle_descriptor(30.0)), plain(x))


@pytest.mark.parametrize("name", CASES)
def test_a_descriptor_for_all_examples_or_one_for_each(name: str) -> None:
    make, shape = CASES[name]
    model, x, descriptor = make(), torch.randn(4, 6).double(), torch.randn(shape).double()
    assert torch.allclose(model(x, descriptor), model(x, descriptor.expand(4, *shape)), rtol=1e-12)
    others = torch.stack([descriptor, torch.randn(shape).double(), descriptor, descriptor])
    expected = torch.cat([model(x[k : k + 1], others[k]) for k in range(4)])
    assert torch.allclose(model(x, others), expected, rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_one_call_takes_all_past_tasks(name: str) -> None:
    make, shape = CASES[name]
    model, sizes = make(), (4, 3, 5)
    batches = memory(
        sizes,
        lambda n: torch.randn(n, 6),
        lambda n: torch.randint(3, (n,)),
        descriptors=[torch.randn(shape) for _ in sizes],
    )
    assert_as_the_loop(model, batches)
    engine, objective = Fused(), Objective(model, F.cross_entropy)
    for _ in range(2):
        engine(objective, batches, trained(model))
    with mock.patch.object(type(model), "forward", autospec=True, side_effect=type(model).forward) as forward:
        engine(objective, batches, trained(model))
    assert forward.call_count == 1


@pytest.mark.parametrize("degrees", [0.0, 17.5, 180.0])
def test_an_angle_is_told_by_its_multiples(degrees: float) -> None:
    got = angle_descriptor(degrees)
    angles = [math.radians(degrees) * k for k in range(1, 5)]
    expected = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)]) / 2
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, atol=1e-6)
