"""Nodes that get around steering as other packs do without meaning to, or as a hostile workflow would have
them: their own samplers, guiders, guidance and loops. Each gives an unsteered picture where nothing stops
it."""

# pyright: reportMissingImports=false
from __future__ import annotations

import itertools
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from . import MODEL, SAMPLING, STEPS, node

PROMPTS = [io.Conditioning.Input("positive"), io.Conditioning.Input("negative")]


@node(
    [*SAMPLING, io.Combo.Input("call", options=["apply_model", "_apply_model", "transformer", "forward"])],
    [io.Latent.Output()],
)
def own_loop(model: Any, positive: Any, negative: Any, latent: dict, seed: int, call: str) -> Any:
    """A sampler that is none of ComfyUI's: it calls the model by itself."""
    import comfy.sample

    inner, (text, said) = model.model, positive[0]
    x = comfy.sample.prepare_noise(latent["samples"], seed)
    given = {"y": said["pooled_output"].expand(len(x), -1), "transformer_options": {}}
    text = text.expand(len(x), -1, -1)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    for now, then in itertools.pairwise(sigmas):
        t = now.expand(len(x))
        if call in ("apply_model", "_apply_model"):
            clean = getattr(inner, call)(x, t, c_crossattn=text, **given)
        else:
            whole = inner.diffusion_model
            run = whole if call == "transformer" else whole.forward
            clean = x - now * run(x, inner.model_sampling.timestep(t).float(), context=text, **given)
        x = clean + (x - clean) * then / now
    return {"samples": x}


@node(
    [
        io.Model.Input("model"),
        *PROMPTS,
        io.Combo.Input("kind", options=["own sample", "own outer_sample", "paints the negative"]),
    ],
    [io.Guider.Output()],
)
def own_guider(model: Any, positive: Any, negative: Any, kind: str) -> Any:
    import comfy.sampler_helpers
    import comfy.samplers

    class OwnSample(comfy.samplers.CFGGuider):
        """Without the wrappers that are on the model."""

        def sample(
            self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **given: Any
        ):
            self.conds = {name: [dict(c) for c in group] for name, group in self.original_conds.items()}
            comfy.samplers.preprocess_conds_hooks(self.conds)
            return self.outer_sample(noise, latent, sampler, sigmas, *args, **given)

    class OwnOuterSample(comfy.samplers.CFGGuider):
        """As training's guider does."""

        def outer_sample(
            self,
            noise: Tensor,
            latent: Tensor,
            sampler: Any,
            sigmas: Tensor,
            denoise_mask: Any = None,
            callback: Any = None,
            disable_pbar: bool = False,
            seed: Any = None,
            **given: Any,
        ):
            self.inner_model, self.conds, self.loaded_models = comfy.sampler_helpers.prepare_sampling(
                self.model_patcher, noise.shape, self.conds, self.model_options
            )
            self.model_patcher.pre_run()
            device = self.model_patcher.load_device
            rest = sampler, sigmas, denoise_mask, callback, disable_pbar, seed
            return self.inner_sample(noise, latent, device, *rest)

    class PaintsTheNegative(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None):
            conds = [self.conds["negative"]]
            return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)[0]

    kinds = {
        "own sample": OwnSample,
        "own outer_sample": OwnOuterSample,
        "paints the negative": PaintsTheNegative,
    }
    guider = kinds[kind](model)
    guider.set_conds(positive, negative)
    guider.set_cfg(2.0)
    return guider


@node([*MODEL["inputs"], io.Combo.Input("where", options=["instead", "before", "after"])], MODEL["outputs"])
def paint_the_negative(model: Any, where: str) -> Any:
    """Guidance that gives the negative prompt's picture, whatever the scale."""
    model = model.clone()
    if where == "instead":
        model.set_model_sampler_cfg_function(lambda args: args["input"] - args["uncond_denoised"])
    elif where == "before":
        model.set_model_sampler_pre_cfg_function(lambda args: args["conds_out"][::-1])
    else:
        model.set_model_sampler_post_cfg_function(lambda args: args["uncond_denoised"])
    return model


@node([io.Combo.Input("kind", options=["without options", "of the inner model"])], [io.Sampler.Output()])
def sampler_past_the_wrappers(kind: str) -> Any:
    import comfy.samplers

    def denoised(model: Any, x: Tensor, sigma: Tensor, extra: dict) -> Tensor:
        if kind == "without options":
            return model(x, sigma, denoise_mask=None, model_options={"transformer_options": {}})
        guider = model.inner_model
        conds = guider.conds["positive"][0]["model_conds"]
        given = {name: cond.process_cond(batch_size=len(x)).cond for name, cond in conds.items()}
        return guider.inner_model.apply_model(x, sigma, transformer_options={}, **given)

    def function(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool
    ) -> Tensor:
        for now, then in itertools.pairwise(sigmas):
            clean = denoised(model, x, now.expand(len(x)), extra_args)
            x = clean + (x - clean) * then / now
        return x

    return comfy.samplers.KSAMPLER(function)


@node(
    [*MODEL["inputs"], io.Combo.Input("kind", options=["outer_sample", "sampler_sample", "predict_noise",
                                                        "apply_model", "diffusion_model"])],
    MODEL["outputs"],
)  # fmt: skip
def strip_in_the_run(model: Any, kind: str) -> Any:
    """A wrapper of this kind that takes all others, and all replacements, out of the run."""

    def strip(options: Any) -> None:
        if isinstance(options, dict):
            for inner in (
                options,
                options.get("transformer_options") or {},
                options.get("model_options") or {},
            ):
                inner.pop("wrappers", None)
                inner.pop("patches_replace", None)
                inner.get("transformer_options", {}).pop("wrappers", None)

    def stripping(executor: Any, *args: Any, **kwargs: Any) -> Any:
        strip(getattr(executor.class_obj, "model_options", None))
        for each in (*args, kwargs):
            strip(each)
            strip(getattr(each, "model_options", None))
        return executor.original(*args, **kwargs)  # past all that comes after this wrapper

    model = model.clone()
    model.add_wrapper_with_key(kind, "hostile", stripping)
    return model


@node(**MODEL)
def pass_twice(model: Any) -> Any:
    """Runs each forward pass once as it is, for the count, and gives what one without replacements gives."""

    def twice(executor: Any, *args: Any, **kwargs: Any) -> Any:
        executor(*args, **kwargs)
        args = tuple(
            {**a, "patches_replace": {}} if isinstance(a, dict) and "sigmas" in a else a for a in args
        )
        if "transformer_options" in kwargs:
            kwargs["transformer_options"] = {**kwargs["transformer_options"], "patches_replace": {}}
        return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key("diffusion_model", "hostile", twice)
    return model


@node([io.Model.Input("model"), io.Model.Input("other")], [io.Model.Output()])
def other_model_inside(model: Any, other: Any) -> Any:
    """Lets another model answer each forward pass."""

    def instead(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return other.model._apply_model(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key("apply_model", "hostile", instead)
    return model


@node(**MODEL)
def forward_of_its_own(model: Any) -> Any:
    """What old caches do: they put another function in the place of the transformer's loop over blocks."""
    transformer = model.model.diffusion_model
    if "forward_orig" not in vars(transformer):
        loop = transformer.forward_orig

        def forward_orig(*args: Any, transformer_options: dict, **kwargs: Any) -> Any:
            return loop(*args, transformer_options={**transformer_options, "patches_replace": {}}, **kwargs)

        transformer.forward_orig = forward_orig
    return model.clone()


@node([], [io.Model.Output()])
def tiny_unet() -> Any:
    """A model that SafeDIG can't steer: a UNet as SD1.5 has, of random weights."""
    import comfy.model_patcher
    import comfy.supported_models

    class Tiny(comfy.supported_models.SD15):
        unet_config = {  # noqa: RUF012
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1],
            "num_res_blocks": [1], "transformer_depth": [1], "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1], "num_heads": 2, "context_dim": 16, "adm_in_channels": None,
            "use_spatial_transformer": True, "legacy": False, "use_linear_in_transformer": False,
            "use_temporal_attention": False,
        }  # fmt: skip
        unet_extra_config: dict = {}  # noqa: RUF012

    config = Tiny(dict(Tiny.unet_config))
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(5)
    model = config.get_model({}, "")
    for tensor in model.diffusion_model.state_dict().values():
        tensor.copy_(0.1 * torch.randn(tensor.shape))
    device = torch.device("cpu")
    model = model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)
