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

    def model(self, family: str, dtype: torch.dtype = torch.float32, seed: int = 5) -> Any:
        """A tiny model of random weights, of the classes that a full-size one has."""
        import comfy.model_patcher

        torch.manual_seed(seed)
        device = torch.device("cpu")
        model = (_flux if family == "flux" else _sd3)(dtype)
        for tensor in model.diffusion_model.state_dict().values():  # left as memory was, buffers too
            tensor.copy_(0.3 * torch.randn(tensor.shape))
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

    def references(self, count: int) -> dict:
        g = torch.Generator().manual_seed(4)
        return {"reference_latents": [torch.randn(1, 16, 8, 8, generator=g) for _ in range(count)]}

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
        noise = torch.randn(images, 16, size, size, generator=torch.Generator().manual_seed(seed))
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


def _flux(dtype: torch.dtype) -> Any:
    import comfy.ldm.flux.model
    import comfy.supported_models

    wanted = {
        "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": TEXT, "hidden_size": WIDTH,
        "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6],
        "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [],
    }  # fmt: skip
    known = {f.name for f in fields(comfy.ldm.flux.model.FluxParams)}
    config = {k: v for k, v in wanted.items() if k in known} | {"image_model": "flux"}
    model = comfy.supported_models.FluxSchnell(config)
    model.set_inference_dtype(dtype, None)
    return model.get_model({}, "")


def _sd3(dtype: torch.dtype) -> Any:
    import comfy.supported_models

    linear = {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 128}}
    config = {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None,
        "adm_in_channels": 8, "context_embedder_config": linear, "num_patches": 256, "pos_embed_max_size": 16,
        "qk_norm": "rms", "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [],
    }  # fmt: skip
    model = comfy.supported_models.SD3(config)
    model.set_inference_dtype(dtype, None)
    return model.get_model({}, "")
