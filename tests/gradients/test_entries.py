"""The first linear layer over a memory of mostly zeros, against dense products."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from utils.engines import fused, loop

from gem_fast import Batch, Sample
from gem_fast.gradients.fused.batch_cache import BatchCache
from gem_fast.gradients.fused.entries import MAX_DENSITY, LayerInput, SparseEntries, TaskEntries
from gem_fast.gradients.fused.task_batch import Inputs
from gem_fast.paper.data import MNIST_5K, load_data

DTYPES = [torch.float32, torch.float64]


def mostly_zeros(rows: int, columns: int, dtype: torch.dtype = torch.float64, part: float = 0.2) -> Tensor:
    x = torch.randn(rows, columns, dtype=dtype)
    return torch.where(torch.rand(rows, columns) < part, x, 0.0)


def entries_of(x: Tensor, sizes: list[int]) -> SparseEntries:
    return SparseEntries([TaskEntries(mine.contiguous()) for mine in x.split(sizes)])


def gradient_(out: Tensor, delta: Tensor, sizes: list[int], entries: SparseEntries, positions: Tensor | None) -> None:
    """out[k] = task k's delta' x."""
    torch.ops.gem_fast._layer_gradient_(out, delta, *LayerInput.of(None, entries, positions), sizes)


def assert_same_entries(got: SparseEntries, expected: SparseEntries) -> None:
    """Line by line: a part's entries lie somewhere within the whole's."""
    for mine, right in (
        (got.by_rows, expected.by_rows),
        (got.row_pairs, expected.row_pairs),
        (got.column_pairs, expected.column_pairs),
    ):
        first, last = mine[-3][0], mine[-3][-1]
        assert all(a.equal(b) for a, b in zip(mine[:-3], right[:-3], strict=True))
        assert (mine[-3] - first).equal(right[-3])
        assert mine[-2][first:last].equal(right[-2])
        assert mine[-1][first:last].equal(right[-1])


def dense_gradient(x: Tensor, grad: Tensor, sizes: list[int]) -> Tensor:
    return torch.stack([g.T @ mine for g, mine in zip(grad.split(sizes), x.split(sizes), strict=True)])


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    columns=st.integers(1, 70),
    outputs=st.integers(1, 150),
    part=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 3),
)
def test_equals_dense_products(
    dtype: torch.dtype, sizes: list[int], columns: int, outputs: int, part: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = mostly_zeros(sum(sizes), columns, dtype, part)
    entries = entries_of(x, sizes)
    weight, bias, grad = (torch.randn(*s, dtype=dtype) for s in ((outputs, columns), (outputs,), (len(x), outputs)))
    tolerance = {"rtol": 0.0, "atol": 2e-4 if dtype == torch.float32 else 1e-11}
    torch.testing.assert_close(entries.linear(None, weight, bias), F.linear(x, weight, bias), **tolerance)
    torch.testing.assert_close(entries.linear(None, weight, None), F.linear(x, weight), **tolerance)
    # Rows of G: a task's block is contiguous, the tasks are not.
    G = torch.full((len(sizes), outputs * columns + 3), 7.0, dtype=dtype)
    out = G[:, 1:-2].unflatten(1, (outputs, columns))
    gradient_(out, grad, sizes, entries, None)
    torch.testing.assert_close(out, dense_gradient(x, grad, sizes), **tolerance)
    assert (G[:, 0] == 7).all()
    assert (G[:, -2:] == 7).all()

    # A sample of each task, and the same for some of the tasks.
    taken = [max(1, n // 2) for n in sizes]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    positions = torch.cat([torch.randperm(n)[:m] + s for n, m, s in zip(sizes, taken, starts, strict=True)])
    torch.testing.assert_close(
        entries.linear(positions, weight, bias), F.linear(x[positions], weight, bias), **tolerance
    )
    gradient_(out, grad[: len(positions)], taken, entries, positions)
    torch.testing.assert_close(out, dense_gradient(x[positions], grad[: len(positions)], taken), **tolerance)
    tasks = slice(len(sizes) // 2, len(sizes))
    examples = slice(starts[tasks.start], len(x))
    some = entries.of_tasks(tasks)
    torch.testing.assert_close(some.linear(None, weight, bias), F.linear(x[examples], weight, bias), **tolerance)
    gradient_(out[tasks], grad[examples], sizes[tasks], some, None)
    torch.testing.assert_close(out[tasks], dense_gradient(x[examples], grad[examples], sizes[tasks]), **tolerance)
    if len(sizes) > 2:  # a part of a part
        last = some.of_tasks(slice(1, len(sizes[tasks])))
        assert_same_entries(last, SparseEntries([TaskEntries(mine.contiguous()) for mine in x.split(sizes)[tasks][1:]]))


def test_the_same_bits_with_any_number_of_threads() -> None:
    x = mostly_zeros(90, 50, torch.float32)
    weight, bias, grad = torch.randn(30, 50), torch.randn(30), torch.randn(90, 30)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        entries, out = entries_of(x, [30] * 3), torch.empty(3, 30, 50)
        gradient_(out, grad, [30] * 3, entries, None)
        results.append((entries.linear(None, weight, bias), out))
    torch.set_num_threads(before)
    assert all(a.equal(b) for pair in results[1:] for a, b in zip(pair, results[0], strict=True))


def test_is_used_where_it_pays() -> None:
    digits = load_data(MNIST_5K).train_images[:50].flatten(1).float() / 255
    assert TaskEntries.of(digits) is not None
    for dense in (torch.rand(20, 8), mostly_zeros(20, 50, part=1.5 * MAX_DENSITY), digits.half(), digits.long()):
        assert TaskEntries.of(dense) is None


@settings(max_examples=40)
@given(
    n=st.integers(1, 300), d=st.integers(1, 70), part=st.sampled_from([0.0, 0.2, 1.0]), seed=st.integers(0, 3),
    of=st.sampled_from(["rows", "columns"]),
)  # fmt: skip
def test_every_line_is_in_one_pair_with_all_its_entries(n: int, d: int, part: float, seed: int, of: str) -> None:
    torch.manual_seed(seed)
    x = mostly_zeros(n, d, part=part)
    entries = TaskEntries(x)
    members, start, index, values = entries.row_pairs if of == "rows" else entries.column_pairs
    lines = x if of == "rows" else x.T
    assert sorted(m for m in members.tolist() if m >= 0) == list(range(len(lines)))
    assert len(start) == (len(lines) + 1) // 2 + 1
    for i, pair in enumerate(members.view(-1, 2).tolist()):
        mine = slice(start[i], start[i + 1])
        for c, line in enumerate(pair):
            got = torch.zeros(lines.shape[1], dtype=x.dtype).index_put((index[mine].long(),), values[mine, c])
            assert got.equal(lines[line] if line >= 0 else torch.zeros_like(got))
        # What is zero in both takes no time.
        assert bool((values[mine] != 0).any(1).all())
        if of == "columns":
            assert {line // 32 for line in pair if line >= 0} == {i // 16}


def test_pairs_have_much_in_common() -> None:
    digits = load_data(MNIST_5K).train_images[:256].flatten(1).float() / 255
    for x in (digits, digits[:, torch.randperm(784)].contiguous()):
        entries = TaskEntries(x)
        count = int(torch.count_nonzero(x))
        assert len(entries.row_pairs[2]) < 0.66 * count
        assert len(entries.column_pairs[2]) < 0.75 * count


def test_only_new_tasks_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    of = TaskEntries.of
    monkeypatch.setattr(TaskEntries, "of", lambda x: made.append(len(x)) or of(x))
    cache = BatchCache(F.cross_entropy)
    batches = [Batch(k, mostly_zeros(4 + k, 50, part=0.1), torch.zeros(4 + k, dtype=torch.int64)) for k in range(3)]
    for past, expected in (
        (batches[:2], [4, 5]),
        (batches[:2], []),
        (batches, [6]),
        (batches[1:], []),
        (batches, [4]),
    ):
        made.clear()
        batch = cache(past, None, slice(0, len(past)))
        assert made == expected
        assert batch.entries is not None
        assert_same_entries(batch.entries, SparseEntries([TaskEntries(batch.x) for batch in past]))
    batches[1].x[0, 0] = 3.0
    made.clear()
    assert cache(batches, None, slice(0, 3)).entries is not None
    assert made == [5]
    dense = Batch(3, torch.rand(4, 50, dtype=torch.float64), torch.zeros(4, dtype=torch.int64))
    assert cache([*batches, dense], None, slice(0, 4)).entries is None


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("t", [1, 3])
def test_the_dense_memory_is_not_put_together(t: int, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there a backward for it, with one past task or with several."""
    constraints = [[Batch(k, mostly_zeros(9, 12, part=0.1), torch.randint(3, (9,)))] for k in range(t)]
    sample = Sample(torch.cat([torch.arange(4) + 9 * k for k in range(t)]), [4] * t) if sampled else None
    model = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    parameters, engine = list(model.parameters()), fused(model)
    for _ in range(2):  # which are compared with the loop
        expected = engine(constraints, parameters, sample=sample).G.clone()
    monkeypatch.setattr(Inputs, "together", property(lambda _: pytest.fail("it was")))
    monkeypatch.setattr(nn.Linear, "forward", lambda *_: pytest.fail("the model was called"))
    torch.testing.assert_close(engine(constraints, parameters, sample=sample).G, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("tasks_per_pass", [None, 2])
@pytest.mark.parametrize(
    "front", [nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Dropout(0.0)), nn.Sequential(nn.Flatten(), nn.Tanh())]
)
def test_rows_on_real_digits_are_those_of_the_loop(front: nn.Module, tasks_per_pass: int | None, sampled: bool) -> None:
    data = load_data(MNIST_5K)
    x = data.train_images.double().div(255)
    constraints = [
        [Batch(k, x[40 * k : 40 * k + 40 - k], data.train_labels[40 * k : 40 * k + 40 - k])] for k in range(5)
    ]
    sample = Sample(torch.cat([torch.arange(7) + n for n in (0, 40, 79, 117, 154)]), [7] * 5) if sampled else None
    model = nn.Sequential(front, nn.Linear(784, 20), nn.ReLU(inplace=True), nn.Linear(20, 10)).double()
    parameters = list(model.parameters())
    engine, reference = fused(model, tasks_per_pass=tasks_per_pass), loop(model)
    for _ in range(2):
        G = engine(constraints, parameters, sample=sample).G
        torch.testing.assert_close(G, reference(constraints, parameters, sample=sample).G, rtol=0, atol=1e-12)


def test_frozen_weights_and_changed_examples() -> None:
    x = mostly_zeros(30, 12)
    y = torch.randint(3, (30,))
    constraints = [[Batch(k, x[10 * k : 10 * k + 10], y[10 * k : 10 * k + 10])] for k in range(3)]
    model = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    engine, reference = fused(model), loop(model)
    for change in (lambda: None, lambda: model[0].weight.requires_grad_(False), lambda: x.mul_(2)):
        change()
        parameters = [p for p in model.parameters() if p.requires_grad]
        torch.testing.assert_close(
            engine(constraints, parameters).G, reference(constraints, parameters).G, rtol=0, atol=1e-12
        )


def test_bad_arguments_of_the_operators() -> None:
    x = mostly_zeros(6, 4, torch.float32)
    entries = entries_of(x, [3, 3])
    with pytest.raises(ValueError, match="x must be float32 or float64, got bfloat16"):
        TaskEntries(x.bfloat16())
    with pytest.raises(ValueError, match=r"x must be contiguous with shape \(n, d\), got \(4, 6\)"):
        TaskEntries(x.T)
    with pytest.raises(
        ValueError, match=r"weight must have shape \(outputs, inputs\) and float32, got \(2, 4\) float64"
    ):
        entries.linear(None, torch.zeros(2, 4).double(), None)
    for wrong in (-1, 6):
        with pytest.raises(ValueError, match=f"positions must be from 0 to 5, got {wrong}"):
            entries.linear(torch.tensor([0, wrong]), torch.zeros(2, 4), None)
    with pytest.raises(ValueError, match=r"delta must have shape \(n, outputs\) = \(6, 2\), got \(5, 2\)"):
        gradient_(torch.zeros(2, 2, 4), torch.zeros(5, 2), [3, 3], entries, None)
    with pytest.raises(ValueError, match=r"positions must have shape \(n,\) = \(6,\), got \(5,\)"):
        gradient_(torch.zeros(2, 2, 4), torch.zeros(6, 2), [3, 3], entries, torch.arange(5))
    layer_gradient_ = torch.ops.gem_fast._layer_gradient_
    for dense, got in ((torch.zeros(5, 4), r"\(5, 4\)"), (torch.zeros(24), r"\(24,\)"), (None, "none")):
        expected = r"x must have shape \(n, inputs\) = \(6, 4\) and delta's dtype, got " + got
        with pytest.raises(ValueError, match=expected):
            layer_gradient_(torch.zeros(2, 2, 4), torch.zeros(6, 2), dense, [], None, [3, 3])
    with pytest.raises(ValueError, match="pairs must be four tensors, got 3"):
        layer_gradient_(torch.zeros(2, 2, 4), torch.zeros(6, 2), None, entries.by_rows, None, [3, 3])
    with pytest.raises(ValueError, match=r"out must have shape \(t, outputs, inputs\) with contiguous tasks"):
        layer_gradient_(torch.zeros(2, 4, 2).mT, torch.zeros(6, 2), x, [], None, [3, 3])
