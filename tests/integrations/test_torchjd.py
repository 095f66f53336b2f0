"""TorchJD's UPGrad and DualProj with our solver: the conditions of the projection, and TorchJD's own results."""

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchjd.aggregation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchjd.autojac import jac_to_grad, mtl_backward
from torchjd.linalg import QuadprogProjector

from gem_fast.integrations.torchjd import DualProj, DualProjWeighting, NnqpProjector, UPGrad, UPGradWeighting

PAIRS = [(UPGrad, torchjd.aggregation.UPGrad), (DualProj, torchjd.aggregation.DualProj)]


@st.composite
def jacobians(draw: st.DrawFn) -> Tensor:
    """(m, n) of any rank and scale, rows that repeat or are zero included."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    m, rank = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    J = torch.randn(m, rank, dtype=torch.float64) @ torch.randn(rank, 40, dtype=torch.float64)
    rows = torch.randint(m, (m,)) if draw(st.booleans()) else torch.arange(m)
    J = J[rows] * draw(st.sampled_from([1e-8, 1.0, 1e6]))
    if draw(st.booleans()):
        J[0] = 0
    return J


# On the CPU, and what is run on any other device.
weights_of = pytest.mark.parametrize("weights_of", [NnqpProjector.__call__, NnqpProjector._without_waiting])


@weights_of
@settings(max_examples=50)
@given(J=jacobians(), several=st.booleans())
def test_the_projection_is_exact_without_regularisation(weights_of: Callable[..., Tensor], J: Tensor, several: bool):
    """The KKT conditions of min w' P w subject to w >= u (TorchJD's Lemma 4)."""
    m = len(J)
    U = torch.rand(*([2, 3] if several else []), m, dtype=torch.float64)
    P = J @ J.T
    w = weights_of(NnqpProjector(norm_eps=0.0, reg_eps=0.0), U, P)
    assert w.shape == U.shape
    assert bool((w >= U).all())
    tolerance = 1e-6 * float(P.diagonal().sum()) * float(U.norm())
    assert float((w @ P).min()) >= -tolerance
    assert float(((w - U) * (w @ P)).sum(-1).abs().max()) <= tolerance * float(w.norm())


@weights_of
@settings(max_examples=50)
@given(J=jacobians())
def test_weights_agree_with_quadprog(weights_of: Callable[..., Tensor], J: Tensor):
    U, P = torch.eye(len(J), dtype=torch.float64), J @ J.T
    torch.testing.assert_close(weights_of(NnqpProjector(), U, P), QuadprogProjector()(U, P), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("pref_vector", [None, torch.tensor([1.0, 2.0, 0.5])])
def test_aggregations_agree_with_torchjd(ours: type, theirs: type, pref_vector: Tensor | None):
    J = torch.randn(3, 10)
    J[1] = -J[0] + 0.1 * J[1]  # a conflict
    torch.testing.assert_close(ours(pref_vector)(J), theirs(pref_vector)(J), rtol=1e-4, atol=1e-5)
    options = {"norm_eps": 1e-3, "reg_eps": 1e-2}
    torch.testing.assert_close(
        ours(pref_vector, NnqpProjector(**options))(J),
        theirs(pref_vector, QuadprogProjector(**options))(J),
        rtol=1e-4,
        atol=1e-5,
    )


def test_weightings_take_a_gramian():
    J = torch.randn(4, 6)
    for weighting, aggregator in ((UPGradWeighting(), UPGrad()), (DualProjWeighting(), DualProj())):
        assert isinstance(weighting.projector, NnqpProjector)
        torch.testing.assert_close(weighting(J @ J.T) @ J, aggregator(J))


def test_small_gradients_are_projected_where_norm_eps_is_zero():
    """With TorchJD's norm_eps of 1e-4 they are not."""
    J = 1e-6 * torch.tensor([[1.0, 0.0], [-2.0, 0.1]])
    assert float((J @ DualProj()(J)).min()) < 0
    assert float((J @ DualProj(projector=NnqpProjector(norm_eps=0.0, reg_eps=0.0))(J)).min()) >= -1e-20


def test_a_training_step_lowers_both_losses():
    torch.manual_seed(0)
    shared, heads = nn.Linear(5, 4), [nn.Linear(4, 1), nn.Linear(4, 1)]
    x = torch.randn(16, 5)
    y = [torch.randn(16, 1), torch.randn(16, 1)]
    optimizer = torch.optim.SGD(shared.parameters(), lr=1e-3)

    def losses() -> tuple[Tensor, list[Tensor]]:
        features = shared(x)
        return features, [F.mse_loss(head(features), target) for head, target in zip(heads, y, strict=True)]

    features, before = losses()
    mtl_backward(before, features=features)
    jac_to_grad(shared.parameters(), UPGrad())
    optimizer.step()
    assert all(after < loss for after, loss in zip(losses()[1], before, strict=True))


@pytest.mark.parametrize("name", ["norm_eps", "reg_eps"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_constants_are_checked_whenever_they_are_set(name: str, value: float):
    message = f"{name} must be finite and not negative, got {value}"
    with pytest.raises(ValueError, match=message):
        NnqpProjector(**{name: value})
    projector = NnqpProjector()
    with pytest.raises(ValueError, match=message):
        setattr(projector, name, value)
    assert repr(projector) == "NnqpProjector(norm_eps=0.0001, reg_eps=0.0001)"


def test_an_inexact_projection_is_said_once(caplog: pytest.LogCaptureFixture):
    indefinite = torch.tensor([[1.0, -1.1], [-1.1, 1.0]])
    projector = NnqpProjector(reg_eps=0.0)
    for _ in range(2):
        assert bool(projector(torch.ones(2), indefinite).isfinite().all())
    assert [(record.name, record.levelno) for record in caplog.records] == [("gem_fast", logging.WARNING)]
    assert "not positive semidefinite" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("of", ["G", "U"])
def test_what_is_not_finite_is_an_error(of: str, value: float):
    arguments = {"U": torch.eye(2), "G": torch.eye(2)}
    arguments[of][0, 0] = value
    with pytest.raises(RuntimeError, match="G and U must be finite, got a NaN or an infinity"):
        NnqpProjector()(**arguments)


@weights_of
@pytest.mark.parametrize("scale", [1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_new_tensors_without_a_history(weights_of: Callable[..., Tensor], dtype: torch.dtype, scale: float):
    U, G = torch.eye(2, dtype=dtype, requires_grad=True), scale * torch.eye(2, dtype=dtype, requires_grad=True)
    w = weights_of(NnqpProjector(), U, G)
    assert w.dtype == dtype
    assert not w.requires_grad
    torch.testing.assert_close(w, torch.eye(2, dtype=dtype))
    w.zero_()
    assert U.tolist() == torch.eye(2).tolist()
    assert G.tolist() == (scale * torch.eye(2)).tolist()
