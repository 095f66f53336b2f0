"""A device that is not the CPU, for tests of what the library does on a GPU.

Tensors on it are of the device "meta" to everything that asks for their device. Within `FakeGpu()` all operators run on
the values behind them, which are on the CPU. With `waits = False` every operator that would make the host wait for a
GPU raises `Waits`: those that hand a value to Python, those whose result's shape depends on values, and copies between
host and device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
# Operators that read values on the host.
_READ = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
}
# Operators that take a list of indexes as their second argument; masks among them are read.
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
_DEVICE = torch.device("meta")


class Waits(Exception):
    """The host would wait for the GPU here."""


class OnFakeGpu(Tensor):
    """A tensor on the device, with its values on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnFakeGpu:
        wrapper: OnFakeGpu = Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=_DEVICE
        )
        wrapper.values = values.detach()
        return wrapper

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self) -> Any:
        return self.values.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("a tensor of FakeGpu is used outside of it")


class FakeGpu(TorchDispatchMode):
    """See the module.

    Attributes:
        waits: whether operators that would wait are let pass.
        refused: those that were not; who catches `Waits` does not get by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = True
        self.refused: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        of_device = [x for x in tensors if isinstance(x, OnFakeGpu)]
        result_on_device = bool(of_device)
        if "device" in kwargs:
            wanted = kwargs["device"]
            result_on_device = wanted == _DEVICE if wanted is not None else result_on_device
            kwargs["device"] = torch.device("cpu") if wanted == _DEVICE else wanted
        if not self.waits:
            try:
                self._check(func, args, kwargs, tensors, of_device, result_on_device)
            except Waits as error:
                self.refused.append(str(error))
                raise
        run_args, run_kwargs = tree_map_only(OnFakeGpu, lambda x: x.values, (args, kwargs))
        result = func(*run_args, **run_kwargs)
        # What was written in place, or is handed back as it came, stays the object that it was.
        known = {id(x.values): x for x in of_device}
        if not result_on_device:
            return result
        return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else OnFakeGpu(x), result)

    @staticmethod
    def _check(func: Any, args: Any, kwargs: Any, tensors: list[Tensor], of_device: list[Any], result: bool) -> None:
        if of_device and func in _READ:
            raise Waits(f"{func} reads a value")
        indexes = args[1] if of_device and func in _INDEXING else ()
        if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indexes):
            raise Waits(f"{func} with a mask has a shape that depends on values")
        if func is aten.repeat_interleave.Tensor and of_device and kwargs.get("output_size") is None:
            raise Waits(f"{func} has a shape that depends on values")
        others = [x for x in tensors if not isinstance(x, OnFakeGpu)]
        if func is aten._to_copy.default:
            crosses = bool(of_device) != result
        elif func is aten.copy_.default:
            crosses = bool(of_device) and bool(others)
        elif of_device and any(x.dim() > 0 for x in others):
            raise Waits(f"{func} gets tensors of the host and of the device")
        else:
            crosses = False
        non_blocking = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
        if crosses and not non_blocking:
            raise Waits(f"{func} copies between host and device")


def on_fake_gpu(x: Tensor) -> Tensor:
    """A copy of x on the device; a parameter of one that is one."""
    values = OnFakeGpu(x.detach().clone())
    return torch.nn.Parameter(values, x.requires_grad) if isinstance(x, torch.nn.Parameter) else values


def move_to_fake_gpu(model: torch.nn.Module) -> torch.nn.Module:
    """Moves a model's parameters and buffers; the model itself."""
    for module in model.modules():
        for values in (module._parameters, module._buffers):
            for name, x in values.items():
                if x is not None:
                    values[name] = on_fake_gpu(x)  # type: ignore[assignment, index]
    return model
