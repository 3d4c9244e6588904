"""The real ComfyUI of COMFYUI_PATH, imported into the test process, on the CPU."""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

WIDTH, TEXT = 32, 16


def load(folder: Path) -> None:
    """Makes ComfyUI's modules importable, without its server."""
    sys.path.insert(0, str(folder))
    importlib.import_module("comfy.cli_args").args.cpu = True
    importlib.import_module("comfy.samplers")


class World:
    name = "ComfyUI"

    def __init__(self, patch: pytest.MonkeyPatch):
        self._patch = patch

    def model(
        self, family: str, dtype: torch.dtype = torch.float32, seed: int = 5, operations: Any = None
    ) -> Any:
        """A tiny model of random weights, of the classes that a full-size one has; `operations` make its
        layers where the dtype's own don't."""
        import comfy.model_patcher

        torch.manual_seed(seed)
        device = torch.device("cpu")
        model = MAKERS[family](dtype, operations)
        size = 0.15 if family == "flux2" else 0.3  # its MLPs are gated: what goes through them is squared
        for tensor in model.diffusion_model.state_dict().values():  # left as memory was, buffers too
            tensor.copy_(size * torch.randn(tensor.shape))
        model = model.eval().requires_grad_(False)
        return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)

    def prompt(self, seed: int, tokens: int = 6, wide: int = 8, **extra: Any) -> list:
        """`wide` is the width of the pooled vector."""
        g = torch.Generator().manual_seed(seed)
        prompt = torch.randn(1, tokens, TEXT, generator=g)
        return [prompt, {"pooled_output": torch.randn(1, wide, generator=g), **extra}]

    def control(self, model: Any, tokens: int) -> dict:
        from comfy.controlnet import ControlBase

        width = model.model.diffusion_model.hidden_size
        residual = 0.3 * torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(3))

        class Control(ControlBase):
            def get_control(self, *args: Any, **kwargs: Any) -> dict:
                return {"input": [residual, residual], "output": [residual, residual]}

            def inference_memory_requirements(self, dtype: torch.dtype) -> int:
                return 0

        return {"control": Control(), "control_apply_to_uncond": True}

    def references(self, model: Any, count: int) -> dict:
        g = torch.Generator().manual_seed(4)
        shape = latent_shape(model, 1, 8)
        return {"reference_latents": [torch.randn(shape, generator=g) for _ in range(count)]}

    def sample(
        self,
        model: Any,
        positive: list,
        negative: list | None = None,
        *,
        images: int = 1,
        steps: int = 4,
        cfg: float = 2.0,
        sampler: str = "euler",
        size: int = 8,
        together: bool = True,
        seed: int = 0,
    ) -> Tensor:
        import comfy.model_management
        import comfy.samplers

        def free_memory(device: Any = None, torch_free_too: bool = False) -> Any:
            """What decides whether both branches go into one forward pass; attention asks for a pair."""
            return (1 << 34, 1 << 34) if torch_free_too else (1 << 34 if together else 0)

        self._patch.setattr(comfy.model_management, "get_free_memory", free_memory)
        shape = latent_shape(model, images, size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return comfy.samplers.sample(
            model,
            noise,
            positive,
            negative or [self.prompt(99)],
            cfg,
            torch.device("cpu"),
            comfy.samplers.sampler_object(sampler),
            torch.linspace(1, 0, steps + 1),
            model_options=model.model_options,
            latent_image=torch.zeros_like(noise),
            disable_pbar=True,
            seed=seed,
        )


def latent_shape(model: Any, images: int, size: int) -> tuple[int, int, int, int]:
    """Of pictures of 8 `size` pixels."""
    side = size * model.model.diffusion_model.patch_size // 2  # a token is 16 pixels wide in every family
    return images, model.model.latent_format.latent_channels, side, side


_BLOCKS = {"context_in_dim": TEXT, "hidden_size": WIDTH, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
           "depth_single_blocks": 2, "theta": 10000}  # fmt: skip
_FLUX = _BLOCKS | {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "axes_dim": [4, 6, 6], "patch_size": 2,
    "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [],
}  # fmt: skip
_FLUX2 = _BLOCKS | {
    "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "axes_dim": [4, 4, 4, 4], "patch_size": 1,
    "qkv_bias": False, "guidance_embed": True, "txt_ids_dims": [3], "global_modulation": True,
    "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
}  # fmt: skip
_CHROMA = _BLOCKS | {
    "in_channels": 64, "out_channels": 64, "vec_in_dim": None, "axes_dim": [4, 6, 6], "patch_size": 2,
    "qkv_bias": True, "txt_ids_dims": [], "in_dim": 64, "out_dim": WIDTH, "hidden_dim": 16, "n_layers": 1,
}  # fmt: skip


def _flux(*given: Any) -> Any:
    return _made("FluxSchnell", "flux", _FLUX, *given)


def _flux2(*given: Any) -> Any:
    return _made("Flux2", "flux2", _FLUX2, *given)


def _chroma(*given: Any) -> Any:
    return _made("Chroma", "chroma", _CHROMA, *given)


def _made(kind: str, name: str, wanted: dict[str, Any], *given: Any) -> Any:
    """The model of ComfyUI's class `kind`, with what this version knows of `wanted`."""
    import comfy.ldm.chroma.model
    import comfy.ldm.flux.model
    import comfy.supported_models

    if not hasattr(comfy.supported_models, kind):
        pytest.skip(f"this ComfyUI has no {kind}")
    params = comfy.ldm.chroma.model.ChromaParams if name == "chroma" else comfy.ldm.flux.model.FluxParams
    known = {f.name for f in fields(params)}
    config = {k: v for k, v in wanted.items() if k in known} | {"image_model": name}
    return _built(getattr(comfy.supported_models, kind)(config), *given)


def _built(config: Any, dtype: torch.dtype, operations: Any) -> Any:
    config.set_inference_dtype(dtype, torch.float32 if dtype.itemsize == 1 else None)  # as UNETLoader has it
    config.custom_operations = operations
    return config.get_model({}, "")


def _sd3(*given: Any) -> Any:
    import comfy.supported_models

    linear = {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 128}}
    config = {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None,
        "adm_in_channels": 8, "context_embedder_config": linear, "num_patches": 256, "pos_embed_max_size": 16,
        "qk_norm": "rms", "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [],
    }  # fmt: skip
    return _built(comfy.supported_models.SD3(config), *given)


MAKERS = {"flux": _flux, "sd3": _sd3, "chroma": _chroma, "flux2": _flux2}
