from typing import Any

from numpy.typing import ArrayLike, NDArray

def nnqp(
    P: ArrayLike, q: ArrayLike, lower: float, ridge: float
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]: ...
def set_simd_level(name: str) -> bool: ...
