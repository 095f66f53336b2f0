"""Which module goes through which rule."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from utils.engines import assert_as_the_loop, memory, trained
from utils.layers import LAYERS, BiasOfChild, Head, Listed, OwnRMSNorm
from utils.models import classes
from utils.models import rows as inputs

from gem_fast.gradients.fused import rules
from gem_fast.gradients.fused.recorder import CannotFuse, Recorder
from gem_fast.gradients.fused.rules import rules_of

pytestmark = pytest.mark.usefixtures("one_thread")


def names(model: nn.Module) -> list[tuple[str, str]]:
    return [(type(module).__name__, rule.__name__) for module, rule in rules_of(model, trained(model))]


def test_the_outermost_modules_that_own_parameters() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(OwnRMSNorm(6), nn.PReLU()), nn.LSTM(6, 6), nn.Dropout())
    assert names(model) == [
        ("Linear", "linear"),
        ("OwnRMSNorm", "own_rms_norm"),
        ("PReLU", "once_per_task"),
        ("LSTM", "once_per_task"),
    ]


def test_frozen_modules_go_as_they_are_but_for_those_that_look_at_a_whole_mini_batch() -> None:
    frozen = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.LSTM(6, 6), nn.Embedding(3, 3)).requires_grad_(False)
    assert names(nn.Sequential(frozen, nn.Linear(6, 3))) == [("BatchNorm1d", "once_per_task"), ("Linear", "linear")]


def test_a_parameter_that_a_child_has_too_is_the_childs() -> None:
    assert names(Head(BiasOfChild())) == [("Linear", "linear")]


@pytest.mark.parametrize("kind", [nn.ParameterList, nn.ParameterDict])
def test_parameters_in_a_container_are_those_of_the_module_around_it(kind: type[nn.Module]) -> None:
    assert names(Head(Listed(kind))) == [("Listed", "once_per_task")]
    with pytest.raises(CannotFuse, match="parameters belong to Listed itself, not to one of its layers"):
        names(Listed(kind))


def test_what_is_not_rms_normalisation_by_its_parameters_is_called_once_per_task() -> None:
    class MatrixRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

    assert names(nn.Sequential(MatrixRMSNorm())) == [("MatrixRMSNorm", "once_per_task")]


@pytest.mark.parametrize("name", ["linear", "batch norm 1d", "prelu", "own rms norm", "parameters in a list"])
def test_a_frozen_layer_between_others(name: str) -> None:
    layer, shape = LAYERS[name]
    frozen = layer().requires_grad_(False)
    width = shape[-1]
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), frozen, nn.LazyLinear(3)) if len(shape) == 1 else None
    if model is None:
        model = nn.Sequential(
            nn.Linear(6, shape[0] * width), nn.Unflatten(1, shape), frozen, nn.Flatten(), nn.LazyLinear(3)
        )
    model(torch.zeros(2, 6))
    assert_as_the_loop(model.double(), memory((4, 3, 4), inputs, classes))


def test_a_rule_for_a_module_without_parameters_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def tanh(recorder: Recorder, module: nn.Module, forward: Any, x: Tensor) -> Tensor:
        return torch.tanh(x)

    monkeypatch.setitem(rules._RULES, nn.Tanh, tanh)
    frozen = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).requires_grad_(False)
    model = nn.Sequential(frozen, nn.Linear(6, 3), nn.Tanh())
    assert names(model) == [("Tanh", "tanh"), ("Linear", "linear"), ("Tanh", "tanh")]
    assert_as_the_loop(model.double(), memory((4, 3, 4), inputs, classes))
