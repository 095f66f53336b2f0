"""Random G and gradients for the operators, in every dtype that they take."""

import torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def problem(t: int, p: int, dtype: torch.dtype, parts: int = 3) -> tuple[torch.Tensor, list[torch.Tensor]]:
    G = torch.randn(t, p).to(dtype)
    g = torch.randn(p).to(dtype)
    return G, [part.clone() for part in g.tensor_split(parts)]
