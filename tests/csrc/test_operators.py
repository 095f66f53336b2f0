"""What holds for every operator: torch's own checks, torch.compile, and a sentence for every bad input."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from utils.asserts import assert_same_bits

from gem_fast import ops, project_

OPS = torch.ops.gem_fast


def cases() -> list[tuple[str, Callable[..., object], tuple[object, ...]]]:
    torch.manual_seed(0)
    out = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        G = torch.randn(3, 20).to(dtype)
        grads = [torch.randn(4, 3).to(dtype), torch.randn(8).to(dtype)]
        v = torch.rand(3).double()
        out += [
            (f"gram {dtype}", OPS.gram.default, (G, grads)),
            (f"combine_ {dtype}", OPS.combine_.default, (grads, G, v)),
            (f"pack_ {dtype}", OPS.pack_.default, (torch.zeros(21).to(dtype), [*grads, None], [12, 8, 1])),
            (f"gram in float64 {dtype}", OPS.gram.default, (G, grads, True)),
            (f"project_ {dtype}", OPS.project_.default, (grads, G, 0.5, 0.0)),
            (f"project_ strided {dtype}", OPS.project_.default, ([grads[0].T, grads[1]], G[:, :20], 0.0, 1e-3)),
        ]
    P = torch.eye(3).double()
    out += [
        ("nnqp", OPS.nnqp.default, (P, torch.randn(3).double(), 0.5, 1e-3)),
        ("_project_dual", OPS._project_dual.default, (P, -torch.ones(3).double(), P[0, 0] * 4, None, 0.5, 0.0, False)),
        ("nnqp batched", OPS.nnqp.default, (P.repeat(2, 1, 1), torch.randn(2, 3).double())),
        ("nnqp shared", OPS.nnqp.default, (P, torch.randn(2, 4, 3).double())),
    ]
    out.append(("_distinct", OPS._distinct.default, (torch.empty(5, dtype=torch.int64).random_(), [9, 2], 3)))
    for dtype in (torch.float32, torch.float64):
        out += [(f"{name} {dtype}", op, args) for name, op, args in layer_cases(dtype)]
    return out


def layer_cases(dtype: torch.dtype) -> list[tuple[str, Callable[..., object], tuple[object, ...]]]:
    """The private operators, for two tasks of examples of mostly zeros and an MLP with layers 40-17-3."""
    sizes, positions = [4, 3], torch.tensor([5, 0, 6])
    x = torch.where(torch.rand(7, 40) < 0.2, torch.randn(7, 40), 0.0).to(dtype)
    weights = [torch.randn(17, 40).to(dtype), torch.randn(3, 17).to(dtype)]
    biases = [torch.randn(17).to(dtype), None]
    target = torch.randint(3, (7,))
    rows = OPS._sparse_rows(x)
    task_rows = [OPS._sparse_rows(mine) for mine in x.split(sizes)]

    def pairs(of_columns: bool) -> list[Tensor]:
        tasks = [OPS._sparse_pairs(*mine, 40, of_columns) for mine in task_rows]
        lines, start, index, values = zip(*tasks, strict=True)
        joined = torch.cat([start[0], start[1][1:] + start[0][-1]])
        return [torch.cat(lines), joined, torch.cat(index), torch.cat(values)]

    def gradient(rest: tuple[object, ...], n: int, of: list[int]) -> tuple[object, ...]:
        return (torch.zeros(2, 17, 40, dtype=dtype), torch.randn(n, 17).to(dtype), *rest, of)

    def gradients(t: int) -> tuple[list[Tensor], list[Tensor]]:
        nothing = torch.zeros(0, dtype=dtype)
        return [torch.zeros(t, 3, 17, dtype=dtype)], [torch.zeros(t, 17, dtype=dtype), nothing]

    kept, nothing = torch.zeros(7 * (32 + 16 + 32), dtype=dtype), torch.zeros(0, dtype=dtype)
    weight_grads, bias_grads = [torch.randn_like(weight) for weight in weights], [torch.randn(17).to(dtype), nothing]
    OPS._mlp_examples_(kept, x, [], None, target, weights, biases, sizes)
    given = (weight_grads, bias_grads, [torch.randn(4).to(dtype)])
    hidden, grad = torch.randn(7, 17).to(dtype).relu(), torch.randn(7, 3).to(dtype)
    return [
        ("_sparse_rows", OPS._sparse_rows.default, (x,)),
        ("_sparse_rows, few columns", OPS._sparse_rows.default, (x[:, :9].contiguous(),)),
        ("_sparse_pairs of rows", OPS._sparse_pairs.default, (*rows, 40, False)),
        ("_sparse_pairs of columns", OPS._sparse_pairs.default, (*rows, 40, True)),
        ("_sparse_linear", OPS._sparse_linear.default, (*rows, None, weights[0], biases[0])),
        ("_sparse_linear of a sample", OPS._sparse_linear.default, (*rows, positions, weights[0], None)),
        ("_layer_gradient_", OPS._layer_gradient_.default, gradient((x, [], None), 7, sizes)),
        ("_layer_gradient_ of pairs", OPS._layer_gradient_.default, gradient((None, pairs(True), None), 7, sizes)),
        ("_layer_gradient_ of a sample", OPS._layer_gradient_.default, gradient((None, [*rows], positions), 3, [1, 2])),
        ("_cross_entropy_gradient", OPS._cross_entropy_gradient.default, (grad, target, sizes)),
        ("_mlp_backward", OPS._mlp_backward.default, (grad, [hidden], weights, *gradients(2), sizes)),
        ("_mlp_pass", OPS._mlp_pass.default, (x, [], None, target, weights, biases, *gradients(2), sizes)),
        (
            "_mlp_examples_",
            OPS._mlp_examples_.default,
            (kept, None, [*rows], positions, target, weights, biases, [1, 2]),
        ),
        (
            "_mlp_step_",
            OPS._mlp_step_.default,
            (
                *(kept, None, [*rows], positions, target, weights, biases, [1, 2]),
                *(x[:4], target[:4], *given[:2], 0.5, 1e-3, nothing),
            ),
        ),
        (
            "_mlp_project_",
            OPS._mlp_project_.default,
            (*given, kept, x, [], None, weights, sizes, 0.5, 1e-3, torch.zeros(9000, dtype=dtype)),
        ),
        (
            "_mlp_pass of pairs",
            OPS._mlp_pass.default,
            (None, pairs(False), None, target, weights, biases, *gradients(2), sizes),
        ),
        (
            "_mlp_pass of a sample",
            OPS._mlp_pass.default,
            (None, [*rows], positions, target[:3], weights, biases, *gradients(2), [1, 2]),
        ),
    ]


@pytest.mark.parametrize(("op", "args"), [case[1:] for case in cases()], ids=[case[0] for case in cases()])
def test_opcheck(op: Callable[..., object], args: tuple[object, ...]) -> None:
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:
    schemas = torch._C._jit_get_all_schemas()
    registered = {schema.name for schema in schemas if schema.name.startswith("gem_fast::")}
    assert len(registered) == 17
    assert {op._schema.name for _, op, _ in cases()} == registered


def test_compiles_without_a_graph_break() -> None:
    def step(grads: list[Tensor], G: Tensor) -> tuple[Tensor, Tensor]:
        P, q = ops.gram(G, grads)
        solved = ops.nnqp(P, q, lower=0.5)
        row = torch.empty_like(G[0])
        ops.pack_(row, grads)
        ops.combine_([row], G, solved.v)
        projection = project_(grads, G, 0.5)
        return row, projection.v + solved.v

    G = torch.randn(3, 50)
    grads = [torch.randn(30) - G.sum(0)[:30], torch.randn(20)]
    copies = [x.clone() for x in grads]
    row, v = torch.compile(step, fullgraph=True, backend="aot_eager")(grads, G)
    row_eager, v_eager = step(copies, G)
    assert_same_bits(row, row_eager)
    assert_same_bits(v, v_eager)
    for x, y in zip(grads, copies, strict=True):
        assert_same_bits(x, y)


G = torch.randn(3, 10)
GRADS = [torch.randn(4), torch.randn(6)]
SPARSE = torch.eye(4).to_sparse()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: project_(GRADS, [G]), TypeError, "G must be a tensor or a TaskGradients, got list"),
        (lambda: project_(G[0], G), TypeError, "grads must be a list of tensors, got Tensor"),
        (lambda: project_([G[0], 3], G), TypeError, r"grads\[1\] must be a tensor, got int"),
        (lambda: project_([], G), ValueError, "grads must hold at least one tensor, got an empty list"),
        (lambda: project_(GRADS, G[0]), ValueError, r"G must have shape \(t, p\), got \(10,\)"),
        (
            lambda: project_(GRADS[:1], G),
            ValueError,
            r"grads must hold p = 10 elements in total to match G of shape \(3, 10\), got 4",
        ),
        (lambda: project_(GRADS, G.long()), ValueError, "G must be float32, float64, bfloat16 or float16, got"),
        (
            lambda: project_([GRADS[0], GRADS[1].double()], G),
            ValueError,
            r"grads\[1\] must have G's dtype float32, got float64",
        ),
        (lambda: project_([SPARSE, GRADS[1]], G), TypeError, r"grads\[0\] must be a dense tensor, got a sparse one"),
        (lambda: project_(GRADS, SPARSE), TypeError, "G must be a dense tensor, got a sparse one"),
        (lambda: project_(GRADS, G, margin=-0.5), ValueError, "margin must be finite and not negative, got -0.5"),
        (lambda: project_(GRADS, G, ridge=float("nan")), ValueError, "ridge must be finite and not negative, got nan"),
        (
            lambda: project_([GRADS[0], torch.zeros(1).expand(6)], G),
            ValueError,
            r"grads\[1\] must have memory of its own for every element, got an expanded tensor of shape \(6,\)",
        ),
        (
            lambda: project_([GRADS[0], GRADS[1].to("meta")], G),
            ValueError,
            r"grads\[1\] must be on G's device cpu, got meta",
        ),
        (lambda: project_(GRADS, G.to("meta")), ValueError, "G must be on a device that this build supports"),
        (lambda: ops.gram(G, [G]), ValueError, "grads must hold p = 10 elements in total"),
        (lambda: ops.combine_(GRADS, G, torch.zeros(3)), ValueError, "v must be float64, got float32"),
        (
            lambda: ops.combine_(GRADS, G, torch.zeros(4).double()),
            ValueError,
            r"v must have shape \(t,\) with t = 3 to match G of shape \(3, 10\), got \(4,\)",
        ),
        (lambda: ops.nnqp(G @ G.T, torch.zeros(3).double()), ValueError, "P must be float64, got float32"),
        (
            lambda: ops.nnqp(torch.eye(2).double(), torch.zeros(3).double()),
            ValueError,
            r"P must have shape \(\.\.\., t, t\) with t = 3 to match q of shape \(3,\), got \(2, 2\)",
        ),
        (
            lambda: ops.nnqp(torch.eye(3).double().repeat(2, 1, 1), torch.zeros(4, 3).double()),
            ValueError,
            r"P must be one matrix \(t, t\) or have q's leading dimensions, got P \(2, 3, 3\) and q \(4, 3\)",
        ),
        (lambda: ops.nnqp(torch.eye(1).double(), torch.tensor(1.0).double()), ValueError, r"q must have shape"),
        (
            lambda: ops.pack_(torch.zeros(2, 2), [torch.zeros(4)]),
            ValueError,
            r"row must have shape \(p,\), got \(2, 2\)",
        ),
        (
            lambda: ops.pack_(torch.zeros(8)[::2], [torch.zeros(4)]),
            ValueError,
            "row must be contiguous, got a stride of 2",
        ),
        (
            lambda: ops.pack_(torch.zeros(5), [torch.zeros(4)]),
            ValueError,
            "tensors must hold p = 5 elements in total to fill row, got 4",
        ),
        (
            lambda: ops.pack_(torch.zeros(4), [torch.zeros(4)], [3]),
            ValueError,
            r"tensors\[0\] must have sizes\[0\] = 3 elements, got 4",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call: Callable[[], object], error: type[Exception], message: str) -> None:
    before = [x.clone() for x in GRADS]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    for x, y in zip(GRADS, before, strict=True):
        assert_same_bits(x, y)
