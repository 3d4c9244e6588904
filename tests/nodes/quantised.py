"""Tiny models of the real ComfyUI in 8 bits: as Load Diffusion Model casts them, as comfy-kitchen's layers
hold them, and as a GGUF file's would be held."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nodes.real import World


def cast(world: World, family: str) -> Any:
    """Weights in float8, computed with in float32: weight_dtype of Load Diffusion Model."""
    return world.model(family, torch.float8_e4m3fn)


def int8(world: World, family: str) -> Any:
    return _kitchen(world, family, "int8_tensorwise")


def scaled_fp8(world: World, family: str) -> Any:
    return _kitchen(world, family, "float8_e4m3fn")


def _kitchen(world: World, family: str, form: str) -> Any:
    """With comfy-kitchen's tensors in the blocks, loaded from a state dict as from a file."""
    import comfy.ops

    quant_ops = pytest.importorskip("comfy.quant_ops")
    if not {form, "int8_tensorwise"} <= getattr(quant_ops, "QUANT_ALGOS", {}).keys():
        pytest.skip(f"this ComfyUI has no {form}, or layers that must be loaded to have a state")
    operations = comfy.ops.mixed_precision_ops({}, torch.float32, disabled={"float8_e4m3fn"})  # as on a CPU
    plain = world.model(family).model.diffusion_model
    patcher = world.model(family, operations=operations)
    state = dict(plain.state_dict())
    layout = quant_ops.QUANT_ALGOS[form]["comfy_tensor_layout"]
    for name, layer in plain.named_modules():
        if "blocks" in name and isinstance(layer, nn.Linear):
            held = quant_ops.QuantizedTensor.from_float(layer.weight.data, layout, scale="recalculate")
            state |= held.state_dict(f"{name}.weight")
            state[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps({"format": form}).encode()),
                                                        dtype=torch.uint8)  # fmt: skip
    missing, unexpected = patcher.model.diffusion_model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    weights = [p for p in patcher.model.parameters() if isinstance(p, quant_ops.QuantizedTensor)]
    assert len(weights) > 4
    return patcher


class Packed(Tensor):
    """A matrix as rows of bytes, a scale and 8-bit numbers; its `shape` is the matrix's, and patches wait in
    it until it is unpacked. So GGUF tensors are, as far as others can see."""

    matrix: torch.Size
    patches: list[tuple[list, str]]

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return getattr(self, "matrix", self.size())

    def detach(self) -> Packed:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Packed:
        return _as_packed(super().to(*args, **kwargs), self.shape, [*getattr(self, "patches", [])])

    def unpacked(self) -> Tensor:
        import comfy.lora

        rows = self.as_subclass(Tensor)
        scale, numbers = (part.contiguous() for part in rows.split([4, rows.shape[1] - 4], 1))
        weight = numbers.view(torch.int8) * scale.view(torch.float32)
        for patches, key in self.patches:
            weight = comfy.lora.calculate_weight(patches, weight, key)
        return weight


def _as_packed(rows: Tensor, matrix: torch.Size, patches: list) -> Packed:
    held = rows.as_subclass(Packed)
    held.matrix, held.patches = matrix, patches
    return held


def pack(weight: Tensor) -> Packed:
    scale = weight.abs().amax(1, keepdim=True) / 127
    rows = torch.cat([scale.view(torch.uint8), (weight / scale).round().to(torch.int8).view(torch.uint8)], 1)
    return _as_packed(rows, weight.shape, [])


def gguf(world: World, family: str) -> Any:
    """With packed weights in the blocks, in a ModelPatcher of a class of its own."""
    import comfy.model_patcher
    import comfy.ops
    import comfy.utils

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def forward(self, x: Tensor) -> Tensor:
                if not isinstance(self.weight, Packed):
                    return super().forward(x)
                return nn.functional.linear(x, self.weight.unpacked(), self.bias)

    class Patcher(comfy.model_patcher.ModelPatcher):
        def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
            weight = comfy.utils.get_attr(self.model, key)
            if not isinstance(weight, Packed) or key not in self.patches:
                return super().patch_weight_to_device(key, *args, **kwargs)
            held = _as_packed(weight.as_subclass(Tensor), weight.matrix, [(self.patches[key], key)])
            comfy.utils.set_attr_param(self.model, key, held)
            return None

        def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
            for weight in self.model.parameters() if unpatch_weights else ():
                if isinstance(weight, Packed):
                    weight.patches = []
            return super().unpatch_model(device_to, unpatch_weights)

    patcher = world.model(family, operations=Operations)
    for name, layer in patcher.model.diffusion_model.named_modules():
        if "blocks" in name and isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(pack(layer.weight.data), requires_grad=False)
    return Patcher(patcher.model, patcher.load_device, patcher.offload_device)


KINDS = {"cast to float8": cast, "int8": int8, "scaled float8": scaled_fp8, "GGUF": gguf}
