"""A second device on a machine that has none: tensors with numbers that say they are elsewhere.

Inside `Elsewhere()`, what is made on or moved to the device `ELSEWHERE` stays there, whatever is
computed from it too, and an operation that brings both devices together raises DevicesMix, as it
would on a GPU. The numbers are those of the CPU's kernels, so results can be compared bit by bit.
`waits` names the operations that copied between the devices or read a number: they hold up a GPU.

The device is called "meta", the one that torch has everywhere without its hardware; a real tensor
there has no numbers, and reading one raises as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")
COPIES = {"copy_", "_to_copy"}  # between devices
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
INDEXES = {"index", "index_put", "index_put_"}  # with a mask they count what is in it


class DevicesMix(RuntimeError):
    """Tensors of two devices met in one operation."""


class There(Tensor):
    """A tensor elsewhere; `here` has its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=ELSEWHERE,
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    """Sees what makes a tensor elsewhere without being given one, and notes what waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _compute(func, args, kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        there, name = {isinstance(t, There) for t in tensors}, func.overloadpacket.__name__
        counts = name in WAITS or (name in INDEXES and any(t.dtype == torch.bool for t in tensors))
        if (name in COPIES and len(there) > 1) or (counts and True in there):
            self.waits.append(name)
        return out


class Elsewhere(TorchFunctionMode):
    """While open, ELSEWHERE is a device like any other."""

    def __init__(self) -> None:
        super().__init__()
        self._operations = _Operations()

    @property
    def waits(self) -> list[str]:
        """Names of the operations so far that waited for the device."""
        return self._operations.waits

    def __enter__(self) -> Elsewhere:
        self._swapped = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # so that a module's own `to` can
        self._operations.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._operations.__exit__(*error)
        torch.__future__.set_swap_module_params_on_conversion(self._swapped)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and _is_there(kwargs.get("device")):  # would have no numbers
            return func(*args, **kwargs | {"device": "cpu"}).to(ELSEWHERE)
        if func is Tensor.new_tensor and args[0].device == ELSEWHERE:
            return torch.tensor(args[1], dtype=args[0].dtype).to(ELSEWHERE)
        if func is Tensor.tolist and args[0].device == ELSEWHERE:
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == ELSEWHERE.type


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the numbers; what comes out is on the device where it belongs."""
    name = func.overloadpacket.__name__
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, There)]
    if there and name not in COPIES and any(t.ndim for t in tensors if not isinstance(t, There)):
        raise DevicesMix(f"{name}: {', '.join(f'{t.device.type} {tuple(t.shape)}' for t in tensors)}")
    goes_there = bool(there) and (name != "copy_" or isinstance(args[0], There))
    if kwargs.get("device") is not None:
        goes_there = _is_there(kwargs["device"])
        kwargs = kwargs | {"device": torch.device("cpu")}
    inside = tree_map(lambda t: t.here if isinstance(t, There) else t, (args, kwargs))
    out = func(*inside[0], **inside[1])
    if func._schema.name.endswith("_"):  # in place
        return args[0] if func._schema.returns else None
    if kwargs.get("out") is not None:
        return kwargs["out"]
    return tree_map(lambda t: There(t) if goes_there and isinstance(t, Tensor) else t, out)
