"""Batches as people have them: every engine and form is the loop, for any call, output, target and padding."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from utils.engines import assert_as_the_loop, log_lines
from utils.nests import Fields, Pair, Record
from utils.training import train

from gem_fast import AGEM, GEM, Batch, EpisodicMemory, Fused, Loop
from gem_fast.containers import Nest

pytestmark = pytest.mark.usefixtures("one_thread")


class Tagger(nn.Module):
    """Tokens (n, length) and a mask to logits (n, 4), as the mean over what is not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 5)
        self.output = nn.Linear(5, 4)

    def logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(self.embedding(tokens))) * mask[..., None]
        return self.output(h.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))

    def forward(self, tokens: Tensor, mask: Tensor) -> Any:
        return self.logits(tokens, mask)


class TakesOne(Tagger):
    """Takes a list or a dataclass as its one argument."""

    def forward(self, x: Any) -> Any:
        return self.logits(*([x.data, x.extra["mask"]] if isinstance(x, Record) else x))


class Returns(Tagger):
    """Returns what `make` makes of the logits."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, tokens: Tensor, mask: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.logits(tokens, mask)
        output = self.make(logits)
        if labels is not None:
            output["loss"] = F.cross_entropy(logits, labels)
        return output


def example(n: int, length: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, a mask and classes."""
    generator = torch.Generator().manual_seed(100 * n + 10 * length + seed)
    tokens = torch.randint(1, 11, (n, length), generator=generator)
    mask = torch.rand(n, length, generator=generator).double().round()
    return tokens, mask, torch.randint(4, (n,), generator=generator)


def memory(make: Callable[[Tensor, Tensor, Tensor], Any], sizes: list[int], pad: Any = None, *lengths: int) -> Any:
    """One batch per task of what `make` makes of tokens, mask and classes."""
    widths = lengths or (5,) * len(sizes)
    return [
        [Batch(task, *make(*example(n, length, task)), pad)]
        for task, (n, length) in enumerate(zip(sizes, widths, strict=True))
    ]


CALLS: dict[str, tuple[type[nn.Module], Callable[[Tensor, Tensor], Any]]] = {
    "dict": (Tagger, lambda tokens, mask: {"mask": mask, "tokens": tokens}),
    "mapping": (Tagger, lambda tokens, mask: Fields(tokens=tokens, mask=mask)),
    "tuple": (Tagger, lambda tokens, mask: (tokens, mask)),
    "named tuple": (Tagger, lambda tokens, mask: Pair(tokens, mask)),
    "list": (TakesOne, lambda tokens, mask: [tokens, mask]),
    "dataclass": (TakesOne, lambda tokens, mask: Record(tokens, {"mask": mask, "constant": 1, "none": None})),
}
some_sizes = st.lists(st.integers(1, 5), min_size=2, max_size=4)


@pytest.mark.parametrize("call", CALLS)
@settings(max_examples=4)
@given(sizes=some_sizes)
def test_calls(call: str, sizes: list[int]) -> None:
    kind, make = CALLS[call]
    torch.manual_seed(0)
    assert_as_the_loop(kind().double(), memory(lambda x, mask, y: (make(x, mask), y), sizes))


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dict": (lambda logits: {"logits": logits, "none": None, "constant": torch.ones(())}, lambda out: out["logits"]),
    "tuple": (lambda logits: (logits.exp(), [logits]), lambda out: out[1][0]),
    "dataclass": (lambda logits: Record({"a": logits}), lambda out: out.extra or out.data["a"]),
    "unused loss": (lambda logits: Pair(logits.mean(), logits), lambda out: out.second),
}
TARGETS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor, Any], Tensor]]] = {
    "classes": (lambda y: y, F.cross_entropy),
    "dict": (
        lambda y: {"y": y, "w": (y, y.double())},
        lambda z, y: F.cross_entropy(z, y["y"]) + y["w"][1].mean() * z.mean(),
    ),
    "dataclass": (lambda y: Record([y], None), lambda z, y: F.cross_entropy(z, y.data[0])),
    "none": (lambda y: None, lambda z, y: z.square().mean() if y is None else z.sum()),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sizes", [[4, 3, 5], [4, 4]], ids=str)
def test_outputs_and_targets(output: str, target: str, sizes: list[int]) -> None:
    (make, logits_of), (target_of, loss_fn) = OUTPUTS[output], TARGETS[target]
    torch.manual_seed(0)
    batches = memory(lambda x, mask, y: ((x, mask), target_of(y)), sizes)
    assert_as_the_loop(Returns(make).double(), batches, lambda out, y: loss_fn(logits_of(out), y))


@pytest.mark.parametrize("sizes", [[4, 3, 5], [4, 4, 4]], ids=str)
def test_a_loss_inside_the_model_goes_task_by_task(sizes: list[int]) -> None:
    """With as many examples of each task one pass would be right; with labels to ignore it would not be any more."""

    def make(tokens: Tensor, mask: Tensor, y: Tensor) -> Any:
        return {"tokens": tokens, "mask": mask, "labels": y}, None

    for loss_fn, fallback in (
        (lambda out, y: out["loss"], "the loss relies on an output that is not one per example"),
        (lambda out, y: out["loss"] + 1e-9 * out["logits"].mean(), "the loss relies on an output that is not one"),
        (lambda out, y: out["logits"].square().mean(), None),
    ):
        torch.manual_seed(0)
        model = Returns(lambda logits: {"logits": logits}).double()
        assert_as_the_loop(model, memory(make, sizes), loss_fn, fallback=fallback)


# ---- lengths ---------------------------------------------------------------------------------------------------------


@settings(max_examples=6)
@given(sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=2, max_size=4))
def test_tasks_of_different_lengths_are_padded_into_one_pass(sizes: list[tuple[int, int]]) -> None:
    counts, lengths = [n for n, _ in sizes], [length for _, length in sizes]
    make = lambda x, mask, y: ({"tokens": x, "mask": mask}, y)  # noqa: E731
    torch.manual_seed(0)
    model = Tagger().double()
    assert_as_the_loop(copy.deepcopy(model), memory(make, counts, {"tokens": 3, "mask": 0}, *lengths))
    if len(set(lengths)) > 1:
        fallback = "the tasks' inputs differ in structure, shape, dtype or device"
        assert_as_the_loop(model, memory(make, counts, {"tokens": 3}, *lengths), fallback=fallback)


def test_padding_that_the_model_does_not_mask_is_found_out() -> None:
    make = lambda x, mask, y: ((x, torch.ones_like(mask)), y)  # noqa: E731
    torch.manual_seed(0)
    fallback = "differ from those of one backward per task"
    assert_as_the_loop(Tagger().double(), memory(make, [3, 4], {0: 3, 1: 1}, 5, 6), fallback=fallback)


def test_sparse_inputs_of_different_lengths_are_padded_too() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(F.pad(x, (0, 8 - x.shape[1])))))

    torch.manual_seed(0)
    batches = [
        [Batch(task, F.one_hot(torch.arange(5), length).double(), torch.arange(5) % 3, 0.0)]
        for task, length in enumerate((6, 8, 7))
    ]
    assert_as_the_loop(Wide().double(), batches)


# ---- the hook --------------------------------------------------------------------------------------------------------


def trained_by(
    hook: Callable[..., GEM],
    kind: type[nn.Module],
    make: Callable[[Tensor, Tensor], Any],
    call: Callable[[nn.Module, Any], Tensor],
    lengths: tuple[int, ...] = (5, 6, 4, 5, 7, 5),
    resumed_at: int = -1,
    pad: Any = None,
    **options: Any,
) -> Tensor:
    """The parameters after three tasks of two steps each."""
    torch.manual_seed(3)
    model = kind().double()

    def hooked() -> tuple[torch.optim.Optimizer, GEM]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        return optimizer, hook(model, optimizer, memory=EpisodicMemory(per_task=6, pad=pad), **options)

    optimizer, gem = hooked()
    for step, length in enumerate(lengths):
        if step == resumed_at:
            state = gem.state_dict()
            optimizer, gem = hooked()
            gem.load_state_dict(state)
        tokens, mask, y = example(4, length, step)
        batch = make(tokens, mask), y, step // 2
        train(model, optimizer, gem, [batch], loss_of=lambda x, y, task: F.cross_entropy(call(model, x), y))
    return nn.utils.parameters_to_vector(model.parameters()).detach()


MASKED = {"tokens": 3, "mask": 0, 0: 3, 1: 0, "first": 3, "second": 0, "data": 3}
SWAPPED: Callable[..., Any] = lambda model, x, **task: model(x["second"], x["first"])  # noqa: E731


@pytest.mark.parametrize("call", [*CALLS, "forward="])
@pytest.mark.parametrize("options", [{}, {"memory_batch": 3}], ids=str)
def test_training_is_that_of_the_loop(call: str, options: dict[str, Any]) -> None:
    kind, make = CALLS.get(call, (Tagger, lambda tokens, mask: {"first": mask, "second": tokens}))
    way: dict[str, Any] = {"forward": SWAPPED} if call == "forward=" else {}
    run: Callable[[nn.Module, Any], Tensor] = way.get("forward") or (
        lambda model, x: model(**x) if hasattr(x, "keys") else model(*x) if isinstance(x, tuple) else model(x)
    )
    pad = {"first": 0, "second": 3} if way else MASKED
    trained = functools.partial(trained_by, GEM, kind, make, run, pad=pad, **options, **way)
    with log_lines() as lines:
        expected = trained(engine=Loop())
        for engine in (Fused(), Fused(form="layerwise")):
            assert torch.allclose(trained(engine=engine), expected, rtol=0, atol=1e-12)
        assert torch.equal(trained(resumed_at=5), trained())
    assert lines == []


@pytest.mark.parametrize("pad", [None, {"tokens": 0, "mask": 0}], ids=str)
def test_averaged_gem_takes_tasks_of_different_lengths(pad: Any) -> None:
    """One forward of the padded batch, or one for each task: the mean over the same examples."""
    make: Callable[[Tensor, Tensor], Any] = lambda tokens, mask: {"tokens": tokens, "mask": mask}  # noqa: E731
    run: Callable[[nn.Module, Any], Tensor] = lambda model, x: model(**x)  # noqa: E731
    lengths = (5, 5, 7, 7, 4, 4)
    trained = functools.partial(trained_by, AGEM, Tagger, make, run, lengths, memory_batch=5)
    assert torch.allclose(trained(pad=pad), trained(pad={"tokens": 9, "mask": 0}), rtol=0, atol=1e-12)
    assert torch.equal(trained(pad=pad, resumed_at=3), trained(pad=pad))


def test_a_model_that_takes_the_task_and_a_mapping() -> None:
    class Heads(Tagger):
        def forward(self, tokens: Tensor, mask: Tensor, task: int = 0) -> Tensor:
            return self.logits(tokens, mask) * (1 + task)

    torch.manual_seed(0)
    batches = memory(lambda x, mask, y: ({"tokens": x, "mask": mask}, y), [3, 4, 2])
    assert_as_the_loop(Heads().double(), batches, pass_task=True)


# ---- graphs ----------------------------------------------------------------------------------------------------------


def graphs_of(step: int, n: int = 4) -> list[Any]:
    from torch_geometric.data import Data

    generator = torch.Generator().manual_seed(step)
    graphs = []
    for _ in range(n):
        nodes = int(torch.randint(2, 6, (), generator=generator))
        edges = torch.randint(nodes, (2, 2 * nodes), generator=generator)
        label = torch.randint(3, (1,), generator=generator)
        graphs.append(Data(x=torch.randn(nodes, 4, generator=generator).double(), edge_index=edges, y=label))
    return graphs


# What importing it warns of is its own affair.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_graphs_of_pytorch_geometric() -> None:
    from torch_geometric.data import Batch as GraphBatch
    from torch_geometric.nn import GCNConv, global_mean_pool

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = GCNConv(4, 8), nn.Linear(8, 3)

        def forward(self, data: Any) -> Tensor:
            data.x = torch.relu(self.conv(data.x, data.edge_index))  # changes its batch, as models do
            return self.head(global_mean_pool(data.x, data.batch))

    def trained(hook: Callable[..., GEM], resumed_at: int = -1, **options: Any) -> tuple[Tensor, list[str]]:
        torch.manual_seed(0)
        model = Net().double()

        def hooked() -> tuple[torch.optim.Optimizer, GEM]:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            memory = EpisodicMemory(per_task=6, collate_fn=GraphBatch.from_data_list)
            return optimizer, hook(model, optimizer, memory=memory, **options)

        optimizer, gem = hooked()
        with log_lines() as lines:
            for step in range(6):
                if step == resumed_at:
                    state = gem.state_dict()
                    optimizer, gem = hooked()
                    gem.load_state_dict(state)
                data = GraphBatch.from_data_list(graphs_of(step))
                optimizer.zero_grad()
                F.cross_entropy(model(data.clone()), data.y).backward()
                gem.observe(data.to_data_list(), data.y, step // 2)
                optimizer.step()
        return nn.utils.parameters_to_vector(model.parameters()).detach(), lines

    expected, quiet = trained(GEM, engine=Loop())
    got, lines = trained(GEM)
    assert torch.equal(got, expected)
    assert quiet == []
    assert lines == [
        "one backward per past task instead of one for all: the examples are objects that collate_fn puts together"
    ]
    assert torch.equal(trained(GEM, resumed_at=4)[0], expected)
    for hook, options in ((GEM, {"memory_batch": 3}), (AGEM, {"memory_batch": 5})):
        assert torch.equal(trained(hook, **options)[0], trained(hook, resumed_at=4, **options)[0])


def test_graphs_cannot_go_layerwise() -> None:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = EpisodicMemory(per_task=2, collate_fn=torch.stack)
    gem = GEM(model, optimizer, memory=memory, engine=Fused(form="layerwise"))
    x: Nest = [torch.ones(2)]
    for task in range(3):
        gem.observe(x, torch.zeros(1).long(), task)
    with pytest.raises(RuntimeError, match="got one where the examples are objects that collate_fn puts together"):
        optimizer.step()


def test_a_memory_of_the_users_own_keeps_objects() -> None:
    """One that only keeps to the protocol, and has a collate_fn."""

    class Own:
        def __init__(self, inner: EpisodicMemory) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    def trained(wrap: Callable[[EpisodicMemory], Any]) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(2, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gem = GEM(model, optimizer, memory=wrap(EpisodicMemory(per_task=2, collate_fn=as_batch)))
        for task in range(3):
            x: Nest = [str(number) for number in torch.randn(4, 2).tolist()]
            gem.step(x, torch.randint(3, (4,)), task)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    def as_batch(texts: list[str]) -> Tensor:
        return torch.tensor([[float(number) for number in text.strip("[]").split(",")] for text in texts])

    assert torch.equal(trained(Own), trained(lambda memory: memory))
