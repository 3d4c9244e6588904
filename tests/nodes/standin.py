"""A stand-in for ComfyUI's sampling: small, written for these tests, true to the call shapes.

What is here is what SafeDIG's patching relies on: the ModelPatcher's cloning and wrappers, a run
from guider to sampler, conditionings batched in reverse order, and the block loops of FLUX and SD3
with their replacements. The same contracts run against the real ComfyUI where it is at hand.
"""

from __future__ import annotations

import copy
import math
import sys
import uuid
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

POOLED = 8  # width of the prompt's vector


def latent_shape(model: Any, images: int, size: int) -> tuple[int, int, int, int]:
    """Of pictures of 8 `size` pixels, for a ModelPatcher here or of ComfyUI."""
    side = size * model.model.diffusion_model.patch_size // 2  # a token is 16 pixels wide in every family
    return images, model.model.latent_format.latent_channels, side, side


def _mix(width: int) -> nn.Linear:
    return nn.Linear(width, width)


class FluxDouble(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.img_mlp, self.across = nn.Sequential(_mix(width)), _mix(width)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([txt, img], 1).mean(1, keepdim=True)
        return img + torch.tanh(self.img_mlp(img + vec) + self.across(both)), txt + torch.tanh(
            self.across(txt + both)
        )


class FluxSingle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.own, self.across = _mix(width), _mix(width)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        return x + torch.tanh(self.own(x + vec) + self.across(x.mean(1, keepdim=True)))


class JointBlock(FluxDouble):
    """SD3's order: text first; the last block of a model gives no text."""

    def __init__(self, width: int, last: bool):
        super().__init__(width)
        self.last = last
        self.x_block = nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": self.img_mlp[0]})})

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor | None, Tensor]:
        image, text = super().forward(x, context, c)
        return None if self.last else text, image


def _tokens(x: Tensor, patch: int = 2) -> Tensor:
    return nn.functional.unfold(x, patch, stride=patch).transpose(1, 2)


def _latent(tokens: Tensor, like: Tensor, patch: int = 2) -> Tensor:
    return nn.functional.fold(tokens.transpose(1, 2), like.shape[-2:], patch, stride=patch)


class MLPEmbedder(nn.Module):
    def __init__(self, given: int, width: int):
        super().__init__()
        self.in_layer = nn.Linear(given, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.in_layer(x)


class Flux(nn.Module):
    """2 double and 2 single blocks of width 32, prompts of width 16; FLUX.2's takes no vector, and latents
    of 128 channels as they are."""

    hidden_size = 32

    def __init__(self, channels: int = 16, patch: int = 2, vector: bool = True) -> None:
        super().__init__()
        self.patch_size, seen = patch, channels * patch**2
        self.img_in, self.txt_in = nn.Linear(seen, 32), nn.Linear(16, 32)
        self.vector_in = MLPEmbedder(POOLED, 32) if vector else None
        self.double_blocks = nn.ModuleList(FluxDouble(32) for _ in range(2))
        self.single_blocks = nn.ModuleList(FluxSingle(32) for _ in range(2))
        self.final_layer = nn.Linear(32, seen)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None, options: dict, control: Any, refs: list
    ):
        wrappers = _wrappers(options, "diffusion_model")
        return Executor(self._forward, self, wrappers)(x, t, context, y, options, control, refs)

    def _forward(
        self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None, options: dict, control: Any, refs: list
    ):
        replaced = options.get("patches_replace", {}).get("dit", {})
        img = torch.cat([self.img_in(_tokens(one, self.patch_size)) for one in (x, *refs)], 1)
        txt, vec = self.txt_in(context), t[:, None]
        if self.vector_in is not None:
            y = torch.zeros(len(x), POOLED, dtype=x.dtype) if y is None else y
            vec = vec + self.vector_in(y[:, :POOLED])
        vec = vec[:, None]
        for i, block in enumerate(self.double_blocks):
            if ("double_block", i) in replaced:

                def original(args: dict, block: nn.Module = block) -> dict:
                    image, text = block(args["img"], args["txt"], args["vec"])
                    return {"img": image, "txt": text}

                args = {"img": img, "txt": txt, "vec": vec, "pe": None, "transformer_options": options}
                out = replaced["double_block", i](args, {"original_block": original})
                img, txt = out["img"], out["txt"]
            else:
                img, txt = block(img, txt, vec)
            if control is not None:
                img[:, : control.shape[1]] += control
        img = torch.cat([txt, img], 1)
        for i, block in enumerate(self.single_blocks):
            if ("single_block", i) in replaced:

                def original(args: dict, block: nn.Module = block) -> dict:
                    return {"img": block(args["img"], args["vec"])}

                args = {"img": img, "vec": vec, "pe": None, "transformer_options": options}
                img = replaced["single_block", i](args, {"original_block": original})["img"]
            else:
                img = block(img, vec)
        own = img[:, txt.shape[1] :][:, : _tokens(x, self.patch_size).shape[1]]
        return _latent(self.final_layer(own), x, self.patch_size)


class Chroma(Flux):
    pass


class VectorEmbedder(nn.Module):
    def __init__(self, given: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(given, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class OpenAISignatureMMDITWrapper(nn.Module):
    """2 joint blocks of width 128, prompts of width 16; no wrapper around it, as in ComfyUI."""

    patch_size, hidden_size = 2, 128

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.context_embedder = nn.Linear(64, 128), nn.Linear(16, 128)
        self.y_embedder = VectorEmbedder(POOLED, 128)
        self.joint_blocks = nn.ModuleList(JointBlock(128, i == 1) for i in range(2))
        self.final_layer = nn.Linear(128, 64)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None, options: dict, control: Any, refs: list
    ):
        replaced = options.get("patches_replace", {}).get("dit", {})
        image, text = self.x_embedder(_tokens(x)), self.context_embedder(context)
        c = (t[:, None] + (0 if y is None else self.y_embedder(y)))[:, None]
        for i, block in enumerate(self.joint_blocks):
            if ("double_block", i) in replaced:

                def original(args: dict, block: nn.Module = block) -> dict:
                    assert args["transformer_options"] is not None
                    text, image = block(args["txt"], args["img"], args["vec"])
                    return {"txt": text, "img": image}

                args = {"img": image, "txt": text, "vec": c, "transformer_options": options}
                out = replaced["double_block", i](args, {"original_block": original})
                text, image = out["txt"], out["img"]
            else:
                text, image = block(text, image, c)
            if control is not None:
                image += control
        return _latent(self.final_layer(image), x)


class Executor:
    """A chain of wrappers around a function."""

    def __init__(self, original: Callable, owner: Any, wrappers: list[Callable]):
        self._original, self.class_obj, self._wrappers = original, owner, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._wrappers:
            return self._original(*args, **kwargs)
        inner = Executor(self._original, self.class_obj, self._wrappers[1:])
        return self._wrappers[0](inner, *args, **kwargs)


def _wrappers(options: dict, kind: str) -> list[Callable]:
    return [w for group in options.get("wrappers", {}).get(kind, {}).values() for w in group]


class LatentFormat:
    def __init__(self, channels: int = 16):
        self.latent_channels = channels

    def process_in(self, latent: Tensor) -> Tensor:
        return (latent - 0.1) * 0.5

    def process_out(self, latent: Tensor) -> Tensor:
        return latent / 0.5 + 0.1


class BaseModel(nn.Module):
    least_tokens = 0  # of a prompt, with zeros in front

    def __init__(self, transformer: nn.Module, channels: int = 16):
        super().__init__()
        self.diffusion_model, self.latent_format = transformer, LatentFormat(channels)

    def apply_model(
        self, x: Tensor, t: Tensor, c_concat=None, c_crossattn=None, control=None, options=None, **kw
    ):
        run = Executor(self._apply_model, self, _wrappers(options or {}, "apply_model"))
        return run(x, t, c_concat, c_crossattn, control, options, **kw)

    def _apply_model(self, x: Tensor, t: Tensor, c_concat, c_crossattn, control, options, y, refs=()):
        dtype = next(self.diffusion_model.parameters()).dtype
        parts = (v if v is None else v.to(x.device, dtype) for v in (x, t, c_crossattn, y))
        velocity = self.diffusion_model(*parts, options, control, list(refs))
        return x - t[:, None, None, None] * velocity.float()


class Flux2(BaseModel):
    least_tokens = 512


CPU = torch.device("cpu")


class ModelPatcher:
    def __init__(self, model: Any, load_device: Any = CPU, offload_device: Any = CPU):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable]]] = {}
        self.additional_models: dict[str, list[ModelPatcher]] = {}
        self.object_patches: dict[str, Any] = {}
        self.patches: dict[str, list] = {}
        self.backup: dict[str, Any] = {}

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model, self.load_device, self.offload_device)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {k: {name: [*w] for name, w in g.items()} for k, g in self.wrappers.items()}
        other.additional_models = {k: [m.clone() for m in g] for k, g in self.additional_models.items()}
        other.object_patches = dict(self.object_patches)
        other.patches = {key: [*patches] for key, patches in self.patches.items()}
        return other

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_additional_models_with_key(self, key: str) -> list[ModelPatcher]:
        return self.additional_models.get(key, [])

    def set_additional_models(self, key: str, models: list[ModelPatcher]) -> None:
        self.additional_models[key] = models

    def set_model_patch_replace(self, patch: Callable, name: str, block: str, number: int) -> None:
        replaced = self.model_options["transformer_options"].setdefault("patches_replace", {})
        replaced.setdefault(name, {})[block, number] = patch

    def get_model_object(self, name: str) -> Any:
        return self.object_patches.get(name, getattr(self.model, name))

    def add_patches(self, patches: dict[str, tuple], strength: float) -> None:
        self.patches |= {key: [(strength, value, 1.0, None, None)] for key, value in patches.items()}

    def memory_required(self, shape: list[int]) -> int:
        return 4 * math.prod(shape)


def _give_same_area(group: list[dict], cond: dict) -> None:
    """As ComfyUI does: what covers an area in one group gets a partner in the other, with the first one's
    uuid and the content of what is there."""
    if group and cond["area"] not in [c.get("area") for c in group]:
        there = min(group, key=lambda c: "area" in c)
        group.append({**cond, "prompt": there["prompt"], "pooled": there["pooled"]})


def _is_on(cond: dict, sigma: Tensor) -> bool:
    """Whether a conditioning's range, in noise levels, covers this one."""
    return cond.get("timestep_end", 0.0) <= sigma[0] <= cond.get("timestep_start", 1.0)


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


class Guider:
    """One run. Conditionings are lists of dicts with a prompt, as ComfyUI's are once converted."""

    def __init__(self, patcher: ModelPatcher, conds: dict[str, list[dict]], cfg: float, together: bool):
        self.model_patcher, self._given, self.cfg, self._together = patcher, conds, cfg, together

    def sample(self, noise: Tensor, latent: Tensor, sampler: Callable, sigmas: Tensor) -> Tensor:
        self.conds = {name: [{**cond} for cond in group] for name, group in self._given.items()}
        self.model_options = _copied(self.model_patcher.model_options)
        options = self.model_options["transformer_options"]
        options["wrappers"] = _copied(self.model_patcher.wrappers)
        run = Executor(self.outer_sample, self, _wrappers(options, "outer_sample"))
        return run(noise, latent, SimpleNamespace(sample=sampler), sigmas)

    def outer_sample(self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor) -> Tensor:
        for name, group in self.conds.items():
            for cond in [c for c in group if "area" in c]:
                for other, theirs in self.conds.items():
                    if other != name:
                        _give_same_area(theirs, cond)
        extra = {"model_options": _copied(self.model_options)}
        wrappers = _wrappers(extra["model_options"]["transformer_options"], "sampler_sample")
        return Executor(sampler.sample, sampler, wrappers)(self, sigmas, extra, None, noise, latent)

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict) -> Tensor:
        wrappers = _wrappers(self.model_options["transformer_options"], "predict_noise")
        return Executor(self.predict_noise, self, wrappers)(x, sigma, model_options)

    def predict_noise(self, x: Tensor, sigma: Tensor, model_options: dict) -> Tensor:
        wrappers = _wrappers(model_options["transformer_options"], "calc_cond_batch")
        names = ["positive"] if self.cfg == 1 else ["positive", "negative"]
        run = Executor(self._calc_cond_batch, None, wrappers)
        out = run(self.model_patcher.model, [self.conds[n] for n in names], x, sigma, model_options)
        denoised = out[0] if self.cfg == 1 else out[1] + (out[0] - out[1]) * self.cfg
        uncond = self.conds["negative"] if self.cfg != 1 else None
        for after in model_options.get("sampler_post_cfg_function", []):
            denoised = after({"denoised": denoised, "cond_scale": self.cfg, "uncond": uncond})
        return denoised

    def _calc_cond_batch(self, model: Any, conds: list, x: Tensor, sigma: Tensor, model_options: dict):
        todo = [(c, i) for i, group in enumerate(conds) for c in group if _is_on(c, sigma)][::-1]
        total, parts = [torch.zeros_like(x) for _ in conds], [torch.full_like(x, 1e-37) for _ in conds]
        areas = {c.get("area") for c, _ in todo}
        batches = [[entry for entry in todo if entry[0].get("area") == area] for area in areas]
        for batch in batches if self._together else [[entry] for entry in todo]:
            options = dict(model_options["transformer_options"])
            options |= {"cond_or_uncond": [i for _, i in batch], "uuids": [c["uuid"] for c, _ in batch]}
            context = torch.cat([c["prompt"].expand(len(x), -1, -1) for c, _ in batch])
            lacking = max(0, model.least_tokens - context.shape[1])
            context = nn.functional.pad(context, (0, 0, lacking, 0))
            vectors = [c["pooled"] for c, _ in batch]
            y = None if vectors[0] is None else torch.cat([v.expand(len(x), -1) for v in vectors])
            refs = [r.repeat(len(batch) * len(x), 1, 1, 1) for r in batch[0][0].get("refs", [])]
            height, width, top, left = batch[0][0].get("area", (*x.shape[-2:], 0, 0))
            place = (..., slice(top, top + height), slice(left, left + width))
            many, t = x[place].repeat(len(batch), 1, 1, 1), sigma.repeat(len(batch))
            control = batch[0][0].get("control")
            out = model.apply_model(many, t, None, context, control, options, y=y, refs=refs)
            for part, (_, i) in zip(out.chunk(len(batch)), batch, strict=True):
                total[i][place] += part
                parts[i][place] += 1
        return [sums / count for sums, count in zip(total, parts, strict=True)]


def euler(
    guider: Guider, sigmas: Tensor, extra: dict, callback: Any, noise: Tensor, latent: Tensor
) -> Tensor:
    x = latent + sigmas[0] * noise
    for now, then in pairwise(sigmas):
        clean = guider(x, now.expand(len(x)), extra["model_options"])
        x = clean + (x - clean) * then / now
    return x


def heun(guider: Guider, sigmas: Tensor, extra: dict, callback: Any, noise: Tensor, latent: Tensor) -> Tensor:
    x = latent + sigmas[0] * noise
    for now, then in pairwise(sigmas):
        slope = (x - guider(x, now.expand(len(x)), extra["model_options"])) / now
        ahead = x + slope * (then - now)
        if then > 0:
            slope = (slope + (ahead - guider(ahead, then.expand(len(x)), extra["model_options"])) / then) / 2
        x = x + slope * (then - now)
    return x


SAMPLERS = {"euler": euler, "heun": heun}


class KSampler:
    def __init__(self, model: Any, steps: int, device: Any, sampler: str, scheduler: str, denoise: float):
        self.sigmas = torch.linspace(1, 0, steps + 1)


def sample_custom(
    model: ModelPatcher, noise: Tensor, cfg: float, sampler: Callable, sigmas: Tensor, positive: list,
    negative: list, latent: Tensor, callback: Callable, disable_pbar: bool, seed: int,
) -> Tensor:  # fmt: skip
    """As comfy.sample has it: latents in and out are in the latent format's scale, but zeros stay zeros."""
    form = model.get_model_object("latent_format")
    conds = {
        name: [{"prompt": s, "pooled": said["pooled_output"], "uuid": uuid.uuid4()} for s, said in group]
        for name, group in (("positive", positive), ("negative", negative))
    }
    if latent.any():
        latent = form.process_in(latent)

    def stepping(
        guider: Guider, sigmas: Tensor, extra: dict, _: Any, noise: Tensor, latent: Tensor
    ) -> Tensor:
        return sampler(guider, sigmas, extra, callback, noise, (1 - sigmas[0]) * latent)

    return form.process_out(Guider(model, conds, cfg, together=True).sample(noise, latent, stepping, sigmas))


def sample(
    model: ModelPatcher, noise: Tensor, steps: int, cfg: float, sampler: str, scheduler: str, *args, **kw
) -> Tensor:  # fmt: skip
    sigmas = torch.linspace(1, 0, steps + 1)
    return sample_custom(model, noise, cfg, SAMPLERS[sampler], sigmas, *args, **kw)


class World:
    """What the contracts ask of ComfyUI, here of the stand-in."""

    name = "stand-in"

    def __init__(self, patch: pytest.MonkeyPatch):
        for module, contents in {
            "comfy": {},
            "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
            "comfy.model_management": {
                "get_torch_device": lambda: torch.device("cpu"),
                "unet_offload_device": lambda: torch.device("cpu"),
                "throw_exception_if_processing_interrupted": lambda: None,
                "get_free_memory": lambda device: 1 << 34,
                "get_total_memory": lambda device: 1 << 34,
            },
            "comfy_execution": {},
            "comfy_execution.utils": {"get_executing_context": lambda: None},
            "comfy_execution.progress": {"get_progress_state": lambda: None},
            "comfy.cli_args": {"args": SimpleNamespace(cache_none=False)},
            "comfy.sample": {"sample": sample, "sample_custom": sample_custom},
            "comfy.samplers": {
                "KSampler": KSampler,
                "sampler_object": SAMPLERS.__getitem__,
                "CFGGuider": Guider,
            },
            "comfy.model_base": {"BaseModel": BaseModel},
        }.items():
            fake = ModuleType(module)
            vars(fake).update(contents)
            patch.setitem(sys.modules, module, fake)
        for name in ("model_patcher", "model_management", "model_base", "cli_args", "sample", "samplers"):
            setattr(sys.modules["comfy"], name, sys.modules[f"comfy.{name}"])

    def model(self, family: str, dtype: torch.dtype = torch.float32) -> ModelPatcher:
        torch.manual_seed(5)
        if family == "flux2":
            model = Flux2(Flux(128, 1, vector=False), 128)
        elif family == "chroma":
            model = type("Chroma", (BaseModel,), {})(Chroma(vector=False))
        elif family == "flux":
            model = type("Flux", (BaseModel,), {})(Flux())
        else:
            model = type("SD3", (BaseModel,), {})(OpenAISignatureMMDITWrapper())
        return ModelPatcher(model.to(dtype).requires_grad_(False))

    def prompt(self, seed: int, tokens: int = 6, wide: int = POOLED, **extra: Any) -> dict:
        """`wide` is the width of the pooled vector."""
        g = torch.Generator().manual_seed(seed)
        prompt = torch.randn(1, tokens, 16, generator=g)
        pooled = torch.randn(1, wide, generator=g)
        return {"prompt": prompt, "pooled": pooled, "uuid": uuid.uuid4(), **extra}

    def control(self, model: ModelPatcher, tokens: int) -> dict:
        """What a ControlNet adds to a conditioning: a residual after each double or joint block."""
        width = model.model.diffusion_model.hidden_size
        return {"control": 0.3 * torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(3))}

    def references(self, model: ModelPatcher, count: int) -> dict:
        g = torch.Generator().manual_seed(4)
        return {"refs": [torch.randn(latent_shape(model, 1, 8), generator=g) for _ in range(count)]}

    def sample(
        self,
        model: ModelPatcher,
        positive: list[dict],
        negative: list[dict] | None = None,
        *,
        images: int = 1,
        steps: int = 4,
        cfg: float = 2.0,
        sampler: str = "euler",
        size: int = 8,
        together: bool = True,
        seed: int = 0,
    ) -> Tensor:
        """Latents of `latent_shape`; the two branches in one forward pass, or one after the other."""
        conds = {"positive": positive, "negative": negative or [self.prompt(99)]}
        noise = torch.randn(latent_shape(model, images, size), generator=torch.Generator().manual_seed(seed))
        guider = Guider(model, conds, cfg, together)
        latent = torch.zeros_like(noise)
        return guider.sample(noise, latent, SAMPLERS[sampler], torch.linspace(1, 0, steps + 1))
