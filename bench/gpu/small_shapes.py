"""Every kernel at small shapes, for compute-sanitizer: python bench/gpu/small_shapes.py. Without a GPU on the CPU."""

import torch

from gem_fast import ops, project_

# Rows: one warp and several, single numbers and tensor cores, one panel and two.
ROWS = (1, 5, 17, 32, 33, 40)
COLUMNS = (1, 1025, 3001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def main() -> None:
    """Runs them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for dtype in DTYPES:
        for t in ROWS:
            for p in COLUMNS:
                # Rows that are not aligned, and tensors that begin anywhere.
                G = torch.randn(t, p + 3).to(dtype).to(device)[:, 3 if p == 1025 else 0 :][:, :p]
                g = (torch.randn(p) - G.sum(0).float().cpu()).to(dtype).to(device)
                grads = [part.clone() for part in g.tensor_split(min(p, 5))]
                row = torch.empty(p, dtype=dtype, device=device)
                ops.pack_(row, grads)
                P, q = ops.gram(G, grads)
                ops.combine_([x.clone() for x in grads], G, ops.nnqp(P, q, 0.5, 1e-3).v)
                project_(grads, G, 0.5, 1e-3)
    for t in (1, 20, 40, 120, 200):
        G = torch.randn(5, t, 2 * t, dtype=torch.float64, device=device)
        ops.nnqp(G @ G.mT, torch.randn(5, t, dtype=torch.float64, device=device))
    print("every kernel has run")


if __name__ == "__main__":
    main()
