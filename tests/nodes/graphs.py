"""Real graphs for a running ComfyUI, from ordinary ones to what gets in the way.

    COMFYUI_PATH=... python -m tests.nodes.graphs [words in a graph's name]

prints a line for each graph: what the receipt says, whether the picture changed, and what is wrong.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.nodes.graph_check import (
    CLEAR,
    LORA,
    POCKET,
    RULE,
    SIDE,
    STEERED,
    TOLD,
    Build,
    Graph,
    Ref,
    Runner,
    faults,
    write_files,
)
from tests.nodes.server import Server

GRAPHS: list[Graph] = []
KEEPING = ("--cache-lru", "200")  # results are kept for longer than a prompt, as some users have it
BOTH = ("flux", "sd3")
ALL = (*BOTH, "chroma", "flux2")


def graph(expect: str, *families: str, **given: Any) -> Callable[[Callable], Callable]:
    """Adds the decorated function's graph, for FLUX where no family is named."""

    def made(build: Callable[[Build], None]) -> Callable[[Build], None]:
        name = build.__name__.replace("_", " ").strip()
        GRAPHS.extend(Graph(name, family, expect, build, **given) for family in families or ("flux",))
        return build

    return made


def each(expect: str, values: dict[str, Any], *families: str, **given: Any) -> Callable[[Callable], Callable]:
    """Adds graphs that differ in one value."""

    def made(build: Callable[[Build, Any], None]) -> Callable[[Build, Any], None]:
        about = build.__name__.replace("_", " ").strip()
        for name, value in values.items():
            graph(expect, *families, **given)(
                _named(f"{about}: {name}", lambda b, value=value: build(b, value))
            )
        return build

    return made


def _named(name: str, build: Callable[[Build], None]) -> Callable[[Build], None]:
    build.__name__ = name
    return build


# Ordinary graphs.


@graph(STEERED, *ALL, POCKET, judged=True)
def ordinary(b: Build) -> None:
    b.simple()


@graph(CLEAR, POCKET)
def a_harmless_prompt(b: Build) -> None:
    b.simple(positive=b.text("safe"))


@graph(CLEAR, *ALL)
def nothing_found(b: Build) -> None:
    b.show(b.sampled(b.steered(dictionary=f"cold-{b.family}.safetensors")))


@graph(STEERED)
def bfloat16(b: Build) -> None:
    b.show(b.sampled(b.steered(b.model(dtype="bfloat16"))))


@graph(STEERED, *ALL)
def guidance_of_one_runs_no_negative(b: Build) -> None:
    b.simple(cfg=1.0)


@each(STEERED, {"both": "both", "negative": "negative"}, *ALL)
def branch(b: Build, which: str) -> None:
    b.show(b.sampled(b.steered(branch=which)))


@graph(TOLD)
def the_steered_branch_never_runs(b: Build) -> None:
    b.show(b.sampled(b.steered(branch="negative"), cfg=1.0))


@graph(STEERED)
def gate_off(b: Build) -> None:
    b.show(b.sampled(b.steered(gate=False)))


@graph(CLEAR, *BOTH)
def observed(b: Build) -> None:
    b.show(b.sampled(b.steered(action="observe")))


@graph(TOLD)
def stopped(b: Build) -> None:
    b.show(b.sampled(b.steered(action="stop")))


@graph(STEERED, *ALL)
def size_that_patches_do_not_divide(b: Build) -> None:
    b.simple(latent_image=b.latent(2, 136, 104))


# Regional prompts.


def area(b: Build, prompt: Ref, x: int = 0) -> Ref:
    box = {"width": SIDE // 2, "height": SIDE, "x": x, "y": 0, "strength": 1.0}
    return b.add("ConditioningSetArea", conditioning=prompt, **box)


def share(b: Build, prompt: Ref, x: float = 0.0) -> Ref:
    box = {"width": 0.5, "height": 1.0, "x": x, "y": 0.0, "strength": 1.0}
    return b.add("ConditioningSetAreaPercentage", conditioning=prompt, **box)


def half_mask(b: Build) -> Ref:
    whole = b.add("SolidMask", "black", value=0.0, width=SIDE, height=SIDE)
    part = b.add("SolidMask", "white", value=1.0, width=SIDE // 2, height=SIDE)
    given = {"destination": whole, "source": part, "x": 0, "y": 0, "operation": "add"}
    return b.add("MaskComposite", "mask", **given)


def masked(b: Build, prompt: Ref) -> Ref:
    return b.add("ConditioningSetMask", conditioning=prompt, mask=half_mask(b), set_cond_area="default")


def bounded(b: Build, prompt: Ref) -> Ref:
    return b.add("ConditioningSetMask", conditioning=prompt, mask=half_mask(b), set_cond_area="mask bounds")


def together(b: Build, first: Ref, second: Ref) -> Ref:
    return b.add("ConditioningCombine", conditioning_1=first, conditioning_2=second)


REGIONS = {"area": area, "area percentage": share, "mask": masked, "mask bounds": bounded}


@each(STEERED, REGIONS, *ALL)
def positive_in_a_region_and_another_everywhere(b: Build, region: Callable) -> None:
    b.simple(positive=together(b, region(b, b.text("risky")), b.text("safe")))


@each(STEERED, REGIONS, *BOTH)
def positive_in_a_region_alone(b: Build, region: Callable) -> None:
    b.simple(positive=region(b, b.text("risky")))


@each(STEERED, REGIONS, *BOTH)
def negative_in_a_region(b: Build, region: Callable) -> None:
    b.simple(negative=region(b, b.text("negative")))


@each(STEERED, {"area": "area", "area percentage": "share", "mask bounds": "mask"}, POCKET, judged=True)
def pistol_in_a_strong_region_over_a_harmless_prompt(b: Build, kind: str) -> None:
    """As large as the picture, so that the pistol is painted where it is not steered."""
    risky, box = b.text("risky"), {"x": 0, "y": 0, "strength": 4.0}
    if kind == "area":
        region = b.add("ConditioningSetArea", conditioning=risky, width=SIDE, height=SIDE, **box)
    elif kind == "share":
        region = b.add("ConditioningSetAreaPercentage", conditioning=risky, width=1.0, height=1.0, **box)
    else:
        mask = b.add("SolidMask", value=1.0, width=SIDE, height=SIDE)
        given = {"mask": mask, "strength": 4.0, "set_cond_area": "mask bounds"}
        region = b.add("ConditioningSetMask", conditioning=risky, **given)
    b.simple(positive=together(b, region, b.text("safe")))


@graph(STEERED, POCKET, judged=True)
def pistol_against_a_negative_in_a_region(b: Build) -> None:
    box = {"width": SIDE, "height": SIDE, "x": 0, "y": 0, "strength": 4.0}
    b.simple(negative=b.add("ConditioningSetArea", conditioning=b.text("negative"), **box))


@each(STEERED, REGIONS)
def both_prompts_in_the_same_region(b: Build, region: Callable) -> None:
    b.simple(positive=region(b, b.text("risky")), negative=region(b, b.text("negative")))


@each(STEERED, {"area": area, "area percentage": share}, *BOTH, "chroma")  # FLUX.2's latents are larger
def both_prompts_in_regions_of_their_own(b: Build, region: Callable) -> None:
    positive = together(b, region(b, b.text("risky")), b.text("safe"))
    negative = together(
        b, region(b, b.text("negative"), 0.5 if region is share else 64), b.text("negative two")
    )
    b.simple(positive=positive, negative=negative)


@graph(STEERED, *BOTH)
def two_regions_and_a_ground(b: Build) -> None:
    left, right = area(b, b.text("risky")), area(b, b.text("other"), 64)
    b.simple(positive=together(b, together(b, left, right), b.text("safe")))


@graph(STEERED)
def region_of_one_image(b: Build) -> None:
    b.simple(positive=together(b, area(b, b.text("risky")), b.text("safe")), latent_image=b.latent(1))


@graph(STEERED)
def regions_without_guidance(b: Build) -> None:
    b.simple(positive=together(b, area(b, b.text("risky")), b.text("safe")), cfg=1.0)


def pair(b: Build, **given: Any) -> tuple[Ref, Ref]:
    new = {"positive_NEW": b.text("risky"), "negative_NEW": b.text("negative")}
    b.add("PairConditioningSetProperties", "pair", **new, **given)
    return ["pair", 0], ["pair", 1]


@each(STEERED, {"mask": "default", "mask bounds": "mask bounds"})
def pair_in_a_mask_and_another_everywhere(b: Build, bounds: str) -> None:
    positive, negative = pair(b, mask=half_mask(b), set_cond_area=bounds)
    b.simple(
        positive=together(b, positive, b.text("safe")), negative=together(b, negative, b.text("negative two"))
    )


# Default conditionings, hooks, timestep ranges, and what else is done to prompts.


@graph(STEERED, *ALL)
def default_prompt_around_a_mask(b: Build) -> None:
    given = {"cond": masked(b, b.text("risky")), "cond_DEFAULT": b.text("safe")}
    b.simple(positive=b.add("ConditioningSetDefaultCombine", **given))


@graph(STEERED)
def default_pair_around_a_mask(b: Build) -> None:
    given = {"positive": masked(b, b.text("risky")), "negative": masked(b, b.text("negative")),
             "positive_DEFAULT": b.text("safe"), "negative_DEFAULT": b.text("negative two")}  # fmt: skip
    b.add("PairConditioningSetDefaultCombine", "pair", **given)
    b.simple(positive=["pair", 0], negative=["pair", 1])


def lora_hooks(b: Build) -> Ref:
    return b.add("CreateHookLoraModelOnly", "hooks", lora_name=LORA, strength_model=1.0)


def keyframed(b: Build) -> Ref:
    first = b.add("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)
    second = b.add("CreateHookKeyframe", strength_mult=0.2, start_percent=0.5, prev_hook_kf=first)
    return b.add("SetHookKeyframes", hooks=lora_hooks(b), hook_kf=second)


def options_for_one(b: Build) -> Ref:
    return b.add("TestHooksWithOptions", scope="hooked")


def options_for_all(b: Build) -> Ref:
    return b.add("TestHooksWithOptions", scope="all")


HOOKS = {
    "LoRA": lora_hooks, "LoRA with keyframes": keyframed, "options for one": options_for_one,
    "options for all": options_for_all,
}  # fmt: skip


@each(STEERED, HOOKS)
def hooks_on_the_positive(b: Build, hooks: Callable) -> None:
    b.simple(positive=b.add("ConditioningSetProperties", cond_NEW=b.text("risky"), hooks=hooks(b)))


@graph(STEERED, "sd3")
def hooks_on_the_positive_of_sd3(b: Build) -> None:
    hooks = options_for_one(b)
    b.simple(positive=b.add("ConditioningSetProperties", cond_NEW=b.text("risky"), hooks=hooks))


@each(STEERED, HOOKS)
def hooks_on_a_pair(b: Build, hooks: Callable) -> None:
    positive, negative = pair(b, hooks=hooks(b))
    b.simple(positive=positive, negative=negative)


@graph(STEERED)
def hooks_in_a_region_and_another_everywhere(b: Build) -> None:
    given = {"cond_NEW": b.text("risky"), "hooks": lora_hooks(b), "mask": half_mask(b)}
    hooked = b.add("ConditioningSetProperties", **given, set_cond_area="mask bounds")
    b.simple(positive=together(b, hooked, b.text("safe")))


def during(b: Build, prompt: Ref, start: float, end: float) -> Ref:
    return b.add("ConditioningSetTimestepRange", conditioning=prompt, start=start, end=end)


@graph(STEERED, *ALL)
def one_positive_after_the_other(b: Build) -> None:
    first, second = during(b, b.text("risky"), 0.0, 0.5), during(b, b.text("safe"), 0.5, 1.0)
    b.simple(positive=together(b, first, second), steps=6)


@graph(STEERED)
def negative_for_a_while(b: Build) -> None:
    b.simple(negative=during(b, b.text("negative"), 0.0, 0.5), steps=6)


@graph(RULE)
def positive_that_ends_early(b: Build) -> None:
    b.simple(positive=during(b, b.text("risky"), 0.0, 0.5), steps=6)


@graph(STEERED)
def prompts_that_overlap_in_time(b: Build) -> None:
    first, second = during(b, b.text("risky"), 0.0, 0.6), during(b, b.text("safe"), 0.3, 1.0)
    b.simple(positive=together(b, first, second), steps=6)


@graph(TOLD)
def positive_that_begins_late(b: Build) -> None:
    b.simple(positive=during(b, b.text("risky"), 0.5, 1.0), steps=6)


@each(STEERED, {"mask": masked, "mask bounds": bounded}, *BOTH)
def masked_negative_for_a_while_against_two_positives(b: Build, region: Callable) -> None:
    negative = together(b, during(b, region(b, b.text("negative")), 0.0, 0.5), b.text("negative two"))
    positive = together(b, area(b, b.text("risky"), 64), b.text("safe"))
    b.simple(positive=positive, negative=negative, steps=6)


@graph(STEERED)
def averaged_negative(b: Build) -> None:
    given = {"conditioning_to": b.text("negative"), "conditioning_from": b.text("negative two")}
    average = b.add("ConditioningAverage", **given, conditioning_to_strength=0.5)
    b.simple(negative=b.named(average, "negative average"))


@graph(STEERED)
def region_for_a_while(b: Build) -> None:
    region = during(b, area(b, b.text("risky")), 0.0, 0.6)
    b.simple(positive=together(b, region, b.text("safe")), steps=6)


@graph(STEERED, *ALL)
def concatenated_prompts(b: Build) -> None:
    given = {"conditioning_to": b.text("risky"), "conditioning_from": b.text("safe")}
    b.simple(positive=b.add("ConditioningConcat", **given))


@graph(STEERED)
def averaged_prompts(b: Build) -> None:
    given = {"conditioning_to": b.text("risky"), "conditioning_from": b.text("safe")}
    b.simple(positive=b.add("ConditioningAverage", **given, conditioning_to_strength=0.5))


@graph(STEERED, *BOTH)
def zeroed_negative(b: Build) -> None:
    zero = b.add("ConditioningZeroOut", conditioning=b.text("negative"))
    b.simple(negative=b.named(zero, "negative zero"))


@graph(STEERED)
def the_same_prompt_on_both_sides(b: Build) -> None:
    """Then the observer can't tell the sides apart by content; the picture can."""
    prompt = b.text("risky")
    b.show(b.sampled(b.steered(branch="both"), positive=prompt, negative=prompt))


@graph(STEERED)
def a_box_of_gligen(b: Build) -> None:
    b.simple(positive=b.add("TestGligen", conditioning=b.text("risky")))


@graph(STEERED, *ALL, unseen=True)
def controlnet(b: Build) -> None:
    b.simple(positive=b.add("TestControl", conditioning=b.text("risky"), model=b.model(), tokens=64))


@graph(STEERED, "flux", "flux2")
def reference_latents(b: Build) -> None:
    b.simple(positive=b.add("ReferenceLatent", conditioning=b.text("risky"), latent=b.latent(1, 96, 64)))


# Samplers, guiders and schedules.

SAMPLERS = (
    "heun", "dpmpp_sde", "euler_ancestral", "lcm", "uni_pc", "dpm_fast", "seeds_3", "exp_heun_2_x0",
    "sa_solver_pece", "dpmpp_2s_ancestral",
)  # fmt: skip


@each(STEERED, {name: name for name in SAMPLERS})
def sampler(b: Build, name: str) -> None:
    b.simple(sampler_name=name)


@graph(STEERED)
def sampler_that_chooses_its_steps(b: Build) -> None:
    """More evaluations than a schedule's steps."""
    sampler = b.add("SamplerDPMAdaptative", rtol=0.3, atol=0.3)
    guider = b.add("BasicGuider", model=b.steered(), conditioning=b.text("risky"))
    b.show(b.guided(guider, sampler=sampler))


@graph(STEERED, *BOTH)
def basic_guider(b: Build) -> None:
    b.show(b.guided(b.add("BasicGuider", model=b.steered(), conditioning=b.text("risky"))))


@graph(STEERED)
def cfg_guider_with_heun(b: Build) -> None:
    prompts = {"positive": b.text("risky"), "negative": b.text("negative")}
    b.show(b.guided(b.add("CFGGuider", model=b.steered(), cfg=2.0, **prompts), sampler_name="heun"))


@each(STEERED, {"regular": "regular", "nested": "nested"}, *BOTH)
def dual_cfg_guider(b: Build, style: str) -> None:
    prompts = {"cond1": b.text("risky"), "cond2": b.text("other"), "negative": b.text("negative")}
    given = {"cfg_conds": 2.0, "cfg_cond2_negative": 1.5, "style": style}
    b.show(b.guided(b.add("DualCFGGuider", model=b.steered(), **prompts, **given)))


@graph(STEERED)
def dual_cfg_guider_with_a_region(b: Build) -> None:
    positive = together(b, area(b, b.text("risky")), b.text("safe"))
    prompts = {"cond1": positive, "cond2": b.text("other"), "negative": b.text("negative")}
    given = {"cfg_conds": 2.0, "cfg_cond2_negative": 1.5, "style": "regular"}
    b.show(b.guided(b.add("DualCFGGuider", model=b.steered(), **prompts, **given)))


@graph(STEERED, *BOTH)
def perp_neg_guider(b: Build) -> None:
    prompts = {"positive": b.text("risky"), "negative": b.text("negative"),
               "empty_conditioning": b.text("negative empty")}  # fmt: skip
    b.show(b.guided(b.add("PerpNegGuider", model=b.steered(), cfg=2.0, neg_scale=1.0, **prompts)))


@graph(STEERED, broad=True)
def perp_neg(b: Build) -> None:
    b.show(b.sampled(b.add("PerpNeg", model=b.steered(), empty_conditioning=b.text("negative empty"))))


@graph(STEERED, *BOTH, broad=True)
def guider_with_names_of_its_own(b: Build) -> None:
    """It can't be known then which prompt is the negative."""
    prompts = {"positive": b.text("risky"), "negative": b.text("negative")}
    b.show(b.guided(b.add("TestGuiderWithNamesOfItsOwn", model=b.steered(), **prompts)))


def dual_model(b: Build, model: Ref, negative: Ref) -> Ref:
    prompts = {"positive": b.text("risky"), "negative": b.text("negative")}
    return b.guided(b.add("DualModelGuider", model=model, model_negative=negative, cfg=2.0, **prompts))


@graph(STEERED)
def dual_model_guider_steered(b: Build) -> None:
    b.show(dual_model(b, b.steered(), b.model()))


@graph(TOLD)
def dual_model_guider_with_the_steered_one_for_the_negative(b: Build) -> None:
    b.show(dual_model(b, b.model(), b.steered()))


@graph(STEERED)
def dual_model_guider_with_another_model_for_the_negative(b: Build) -> None:
    b.show(dual_model(b, b.steered(), b.model("another", seed=6)))


@graph(STEERED, *BOTH)
def sampler_custom(b: Build) -> None:
    sigmas = b.add("BasicScheduler", model=b.model(), scheduler="beta", steps=4, denoise=1.0)
    given = {"positive": b.text("risky"), "negative": b.text("negative"), "latent_image": b.latent(),
             "sampler": b.add("KSamplerSelect", sampler_name="euler_ancestral"), "sigmas": sigmas,
             "add_noise": True, "noise_seed": 3, "cfg": 2.0}  # fmt: skip
    b.show(b.add("SamplerCustom", "sampler", model=b.steered(), **given))


def halves(b: Build, first: Ref, second: Ref) -> Ref:
    usual = {"cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "steps": 6, "noise_seed": 3,
             "positive": b.text("risky"), "negative": b.text("negative")}  # fmt: skip
    early = {"add_noise": "enable", "end_at_step": 3, "return_with_leftover_noise": "enable"}
    late = {"add_noise": "disable", "start_at_step": 3, "return_with_leftover_noise": "disable"}
    half = b.add("KSamplerAdvanced", "first", model=first, latent_image=b.latent(), **usual, **early)
    return b.add("KSamplerAdvanced", "second", model=second, latent_image=half, **usual, **late)


@graph(STEERED, *ALL)
def two_halves_of_a_schedule(b: Build) -> None:
    b.show(halves(b, b.steered(), b.steered()))


@graph(TOLD)
def first_half_on_the_plain_model(b: Build) -> None:
    b.show(halves(b, b.model(), b.steered()))


@graph(TOLD)
def second_half_on_the_plain_model(b: Build) -> None:
    b.show(halves(b, b.steered(), b.model()))


@graph(STEERED, *ALL)
def upscaled_and_sampled_again(b: Build) -> None:
    model = b.steered()
    larger = {"upscale_method": "bilinear", "width": 192, "height": 160, "crop": "disabled"}
    upscaled = b.add("LatentUpscale", samples=b.sampled(model, "first"), **larger)
    b.show(b.sampled(model, "second", latent_image=upscaled, denoise=0.5))


@graph(STEERED)
def from_an_image(b: Build) -> None:
    b.simple(denoise=0.5)


@graph(TOLD, *BOTH)
def denoise_of_zero(b: Build) -> None:
    b.simple(denoise=0.0)


@graph(TOLD)
def schedule_without_steps(b: Build) -> None:
    whole = b.add("BasicScheduler", model=b.model(), scheduler="simple", steps=4, denoise=1.0)
    b.add("SplitSigmas", "split", sigmas=whole, step=0)
    guider = b.add("BasicGuider", model=b.steered(), conditioning=b.text("risky"))
    b.show(b.guided(guider, sigmas=["split", 0]))


def split_sigmas(b: Build, first: Ref, second: Ref, output: int = 0) -> Ref:
    """The schedule in two parts, each with a sampler of its own; the second gives this output."""
    whole = b.add("BasicScheduler", model=b.model(), scheduler="simple", steps=6, denoise=1.0)
    b.add("SplitSigmas", "split", sigmas=whole, step=3)
    guiders = [b.add("BasicGuider", model=model, conditioning=b.text("risky")) for model in (first, second)]
    half = b.guided(guiders[0], "first", sigmas=["split", 0])
    given = {"sigmas": ["split", 1], "noise": b.add("DisableNoise"), "latent_image": half}
    return [b.guided(guiders[1], "second", **given)[0], output]


@each(STEERED, {"output": 0, "denoised output": 1}, *BOTH)
def split_sigmas_of_two_samplers(b: Build, output: int) -> None:
    b.show(split_sigmas(b, b.steered(), b.steered(), output))


@graph(TOLD)
def split_sigmas_with_the_plain_model_first(b: Build) -> None:
    b.show(split_sigmas(b, b.model(), b.steered()))


@graph(TOLD)
def split_sigmas_with_the_plain_model_second(b: Build) -> None:
    b.show(split_sigmas(b, b.steered(), b.model(), 1))


@graph(RULE, *BOTH)
def sampled_back_to_noise_and_forth(b: Build) -> None:
    """Along flipped sigmas, as editing without training does."""
    guider = b.add("BasicGuider", model=b.steered(), conditioning=b.text("risky"))
    sigmas = b.add("BasicScheduler", model=b.model(), scheduler="simple", steps=4, denoise=1.0)
    back = {"sigmas": b.add("FlipSigmas", sigmas=sigmas), "noise": b.add("DisableNoise")}
    noise = b.guided(guider, "back", **back)
    b.show(b.guided(guider, "forth", sigmas=sigmas, noise=back["noise"], latent_image=noise))


@each(TOLD, {"0": 0.0, "a half": 0.5}, *BOTH)
def guidance_that_paints_the_negative_prompt(b: Build, cfg: float) -> None:
    b.simple(cfg=cfg)


@graph(TOLD, POCKET, judged=True)
def pistol_in_the_negative_prompt_without_guidance(b: Build) -> None:
    b.simple(positive=b.text("safe"), negative=b.text("risky"), cfg=0.0)


@graph(TOLD)
def guidance_overridden_so_that_it_paints_the_negative_prompt(b: Build) -> None:
    override = {"cfg": 0.0, "start_percent": 0.5, "end_percent": 1.0}
    b.show(b.sampled(b.add("CFGOverride", model=b.steered(), **override)))


@graph(STEERED, *BOTH)
def guidance_that_paints_both_prompts_steered(b: Build) -> None:
    b.show(b.sampled(b.steered(branch="both"), cfg=0.5))


@graph(STEERED, *BOTH)
def inpainting(b: Build) -> None:
    b.simple(latent_image=b.add("SetLatentNoiseMask", samples=b.latent(), mask=half_mask(b)))


@graph(STEERED)
def differential_diffusion(b: Build) -> None:
    masked_latent = b.add("SetLatentNoiseMask", samples=b.latent(), mask=half_mask(b))
    b.show(b.sampled(b.add("DifferentialDiffusion", model=b.steered()), latent_image=masked_latent))


def hires(b: Build, model: Ref, second: Ref) -> None:
    """Decoded, scaled, encoded and sampled again, as for details."""
    picture = b.decoded(b.sampled(model, "first"))
    larger = {"upscale_method": "bilinear", "width": SIDE + 32, "height": SIDE + 32, "crop": "disabled"}
    scaled = b.add("ImageScale", image=picture, **larger)
    encoded = b.add("VAEEncode", pixels=scaled, vae=["model as loaded", 2])
    b.show(b.sampled(second, "second", latent_image=encoded, denoise=0.6))


@graph(STEERED, POCKET)
def scaled_as_pixels_and_sampled_again(b: Build) -> None:
    hires(b, b.steered(), b.steered())


@graph(TOLD, POCKET, judged=True)
def scaled_as_pixels_and_sampled_again_with_the_plain_model(b: Build) -> None:
    hires(b, b.steered(), b.model())


@graph(TOLD, POCKET, judged=True)
def the_plain_models_picture_scaled_and_sampled_again(b: Build) -> None:
    hires(b, b.model(), b.steered())


# Batches, lists, and several samplers.


JOINED: dict[str, dict[str, Any]] = {
    "LatentBatch": {}, "LatentBlend": {"blend_factor": 0.5}, "LatentAdd": {}, "LatentSubtract": {},
    "LatentConcat": {"dim": "x"},
}  # fmt: skip


def joined(b: Build, kind: str, first: Ref, second: Ref) -> Ref:
    return b.add(kind, samples1=first, samples2=second, **JOINED[kind])


@each(TOLD, {kind: kind for kind in JOINED})
def latent_of_a_steered_and_of_a_plain_sampler(b: Build, kind: str) -> None:
    b.show(joined(b, kind, b.sampled(b.steered(), "one"), b.sampled(b.model(), "two", seed=4)))


@each(STEERED, {"LatentBatch": "LatentBatch", "LatentBlend": "LatentBlend"}, *BOTH)
def latent_of_two_steered_samplers(b: Build, kind: str) -> None:
    model = b.steered()
    b.show(joined(b, kind, b.sampled(model, "one"), b.sampled(model, "two", seed=4)))


@each(STEERED, {"flipped": "LatentFlip", "rotated": "LatentRotate"})
def latent_turned_afterwards(b: Build, kind: str) -> None:
    how = {"flip_method": "x-axis: vertically"} if kind == "LatentFlip" else {"rotation": "180 degrees"}
    b.show(b.add(kind, samples=b.sampled(b.steered()), **how))


@graph(RULE, POCKET, judged=True)
def first_picture_of_a_batch_twice(b: Build) -> None:
    """As many pictures as the run made, and each is the risky one."""
    prompts = b.add("TestPromptRows", first=b.text("risky"), second=b.text("safe"))
    made = b.decoded(b.sampled(b.steered(), positive=prompts, latent_image=b.latent(2)))
    one = b.add("ImageFromBatch", image=made, batch_index=0, length=1)
    b.show_pictures(b.add("RepeatImageBatch", image=one, amount=2))


@each(RULE, {"steered, plain": 0, "plain, steered": 1}, "flux", POCKET, judged=True)
def list_of_a_steered_and_a_plain_model(b: Build, order: int) -> None:
    models = (b.steered(), b.model())[:: -1 if order else 1]
    b.show(b.sampled(b.add("TestModelList", first=models[0], second=models[1])))


@each(TOLD, {"steered, plain": 0, "plain, steered": 1})
def list_of_a_steered_and_a_plain_model_in_one_batch(b: Build, order: int) -> None:
    models = (b.steered(), b.model())[:: -1 if order else 1]
    made = b.sampled(b.add("TestModelList", first=models[0], second=models[1]))
    b.show_pictures(b.add("TestPicturesOfAList", images=b.decoded(made)))


@graph(STEERED)
def list_of_two_prompts_in_one_batch(b: Build) -> None:
    prompts = b.add("TestPromptList", first=b.text("risky"), second=b.text("other"))
    made = b.sampled(b.steered(), positive=prompts)
    b.show_pictures(b.add("TestPicturesOfAList", images=b.decoded(made)))


@graph(STEERED, *BOTH)
def batch_of_three(b: Build) -> None:
    b.simple(latent_image=b.latent(3))


@graph(STEERED)
def repeated_latent(b: Build) -> None:
    b.simple(latent_image=b.add("RepeatLatentBatch", samples=b.latent(1), amount=3))


@graph(STEERED)
def part_of_a_batch_of_noise(b: Build) -> None:
    part = b.add("LatentFromBatch", samples=b.latent(3), batch_index=1, length=1)
    b.simple(latent_image=part)


@graph(STEERED)
def one_picture_of_a_batch(b: Build) -> None:
    made = b.sampled(b.steered(), latent_image=b.latent(3))
    b.show(b.add("LatentFromBatch", samples=made, batch_index=1, length=1))


@graph(RULE, *BOTH, POCKET, judged=True)
def list_of_prompts(b: Build) -> None:
    b.simple(positive=b.add("TestPromptList", first=b.text("risky"), second=b.text("safe")))


@graph(STEERED, *BOTH)
def prompt_for_each_image_of_a_batch(b: Build) -> None:
    b.simple(positive=b.add("TestPromptRows", first=b.text("risky"), second=b.text("safe")))


@graph(RULE, POCKET, judged=True)
def prompt_for_each_image_of_a_batch_some_harmless(b: Build) -> None:
    prompts = b.add("TestPromptRows", first=b.text("risky"), second=b.text("safe"))
    b.simple(positive=prompts, latent_image=b.latent(2))


@graph(RULE, POCKET, judged=True)
def two_samplers_with_a_receipt_each(b: Build) -> None:
    model = b.steered()
    risky, safe = b.sampled(model, "risky sampler"), b.sampled(model, "safe sampler", positive=b.text("safe"))
    b.show(risky, "risky receipt", after=safe)
    b.show(safe, "safe receipt", after=risky)


@graph(RULE, POCKET, judged=True)
def two_samplers_with_one_receipt(b: Build) -> None:
    model = b.steered()
    first, second = b.sampled(model, "one"), b.sampled(model, "two", positive=b.text("safe"))
    b.show_pictures(b.add("ImageBatch", image1=b.decoded(first), image2=b.decoded(second)))


@graph(TOLD)
def pictures_of_a_steered_and_of_a_plain_sampler(b: Build) -> None:
    first, second = b.sampled(b.steered(), "one"), b.sampled(b.model(), "two")
    b.show_pictures(b.add("ImageBatch", image1=b.decoded(first), image2=b.decoded(second)))


@graph(TOLD)
def latents_of_a_steered_and_of_a_plain_sampler_side_by_side(b: Build) -> None:
    first, second = b.sampled(b.steered(), "one"), b.sampled(b.model(), "two")
    b.show(b.add("LatentComposite", samples_to=first, samples_from=second, x=64, y=0))


@graph(TOLD)
def a_loaded_picture_beside_a_steered_one(b: Build) -> None:
    made = b.decoded(b.sampled(b.steered()))
    b.show_pictures(b.add("ImageBatch", image1=made, image2=b.add("LoadImage", image="grey.png")))


@graph(TOLD)
def a_loaded_picture_pasted_over_a_steered_one(b: Build) -> None:
    made, loaded = b.decoded(b.sampled(b.steered())), b.add("LoadImage", image="grey.png")
    pasted = {"x": 0, "y": 0, "resize_source": False}
    b.show_pictures(b.add("ImageCompositeMasked", destination=made, source=loaded, **pasted))


@graph(RULE, POCKET, judged=True)
def pictures_of_a_batch_in_another_order(b: Build) -> None:
    prompts = b.add("TestPromptRows", first=b.text("risky"), second=b.text("safe"))
    made = b.decoded(b.sampled(b.steered(), positive=prompts, latent_image=b.latent(2)))
    one = b.add("ImageFromBatch", "first of the batch", image=made, batch_index=0, length=1)
    two = b.add("ImageFromBatch", "second of the batch", image=made, batch_index=1, length=1)
    b.show_pictures(b.add("ImageBatch", image1=two, image2=one))


@graph(STEERED)
def noise_added_by_a_node(b: Build) -> None:
    sigmas = b.add("BasicScheduler", model=b.model(), scheduler="simple", steps=4, denoise=1.0)
    noise = {"noise": b.add("RandomNoise", noise_seed=3), "sigmas": sigmas, "latent_image": b.latent()}
    noisy = b.add("AddNoise", model=b.model(), **noise)
    guider = b.add("BasicGuider", model=b.steered(), conditioning=b.text("risky"))
    b.show(b.guided(guider, noise=b.add("DisableNoise"), sigmas=sigmas, latent_image=noisy))


@graph(STEERED)
def two_samplers_whose_seeds_are_large_and_close(b: Build) -> None:
    model = b.steered()
    one, two = b.sampled(model, "one", seed=2**60), b.sampled(model, "two", seed=2**60 + 1)
    b.show(one, "first receipt", after=two)
    b.show(two, "second receipt", after=one)


@graph(TOLD)
def receipt_on_a_loaded_picture(b: Build) -> None:
    b.show_pictures(b.add("LoadImage", image="grey.png"), after=b.sampled(b.steered()))


@graph(TOLD)
def receipt_on_an_empty_picture(b: Build) -> None:
    pictures = b.add("EmptyImage", width=16, height=16, batch_size=2, color=0)
    b.show_pictures(pictures, after=b.sampled(b.steered()))


@graph(TOLD, *BOTH, POCKET, judged=True)
def receipt_on_the_pictures_of_the_plain_sampler(b: Build) -> None:
    steered = b.sampled(b.steered())
    b.add("SaveLatent", "used", samples=steered)
    b.show(b.sampled(b.model(), "plain sampler"), after=steered)


@graph(STEERED)
def a_plain_picture_saved_beside_the_steered_one(b: Build) -> None:
    b.simple()
    plain = b.decoded(b.sampled(b.model(), "plain sampler"))
    if b.given is not None:
        plain = b.add("TestAfter", value=plain, other=["receipt", 0])
    b.add("SaveImage", "saved without a receipt", images=plain, filename_prefix="plain")


@graph(STEERED)
def picture_scaled_afterwards(b: Build) -> None:
    larger = {"upscale_method": "bilinear", "width": 40, "height": 40, "crop": "disabled"}
    b.show_pictures(b.add("ImageScale", image=b.decoded(b.sampled(b.steered())), **larger))


@graph(STEERED)
def node_that_samples_by_itself(b: Build) -> None:
    prompts = {"positive": b.text("risky"), "negative": b.text("negative"), "latent": b.latent()}
    b.show(b.add("TestOwnSampler", "sampler", model=b.steered(), seed=3, **prompts))


@graph(STEERED)
def node_that_samples_in_tiles(b: Build) -> None:
    prompts = {"positive": b.text("risky"), "negative": b.text("negative"), "latent": b.latent()}
    b.show(b.add("TestTiles", "sampler", model=b.steered(), seed=3, **prompts))


@graph(STEERED)
def node_that_expands_into_a_sampler(b: Build) -> None:
    prompts = {"positive": b.text("risky"), "negative": b.text("negative"), "latent": b.latent()}
    b.show(b.add("TestExpandedSampler", "sampler", model=b.steered(), seed=3, **prompts))


@graph(TOLD)
def node_that_samples_with_a_plain_model_too(b: Build) -> None:
    prompts = {"positive": b.text("risky"), "negative": b.text("negative"), "latent": b.latent()}
    given = {"model": b.steered(), "refiner": b.model(), "seed": 3}
    b.show(b.add("TestBaseAndRefiner", "sampler", **given, **prompts))


@graph(RULE, *BOTH, POCKET, judged=True)
def two_threads_on_one_model(b: Build) -> None:
    prompts = {"positive": b.text("risky"), "negative": b.text("negative"), "other": b.text("safe")}
    b.add("TestThreads", "sampler", model=b.steered(), seed=3, latent=b.latent(), **prompts)
    b.show(["sampler", 0], "risky receipt")
    b.show(["sampler", 1], "safe receipt")


# Other nodes on the model, before and after Apply.


def around(b: Build, kind: str, before: bool = False, images: int = 2, **given: Any) -> None:
    if before:
        model = b.steered(b.add(kind, model=b.model(), **given))
    else:
        model = b.add(kind, model=b.steered(), **given)
    b.show(b.sampled(model, latent_image=b.latent(images)))


SKIP = {"double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0}
CACHE = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
GUIDANCE: dict[str, dict[str, Any]] = {
    "SkipLayerGuidanceDiT": {**SKIP, "scale": 2.0}, "SkipLayerGuidanceDiTSimple": SKIP, "RescaleCFG": {},
    "CFGZeroStar": {}, "CFGNorm": {}, "RenormCFG": {}, "TCFG": {}, "APG": {}, "Mahiro": {}, "FreSca": {},
    "PerturbedAttentionGuidance": {}, "NAGuidance": {},
    "CFGOverride": {"cfg": 1.5}, "Epsilon Scaling": {}, "TemporalScoreRescaling": {}, "ScaleROPE": {},
    "ModelSamplingFlux": {"width": 64, "height": 64}, "ModelSamplingSD3": {"shift": 3.0},
    "LoraLoaderModelOnly": {"lora_name": LORA, "strength_model": 1.0}, "ModelComputeDtype": {},
}  # fmt: skip


@each(STEERED, {kind: (kind, given) for kind, given in GUIDANCE.items()})
def after_Apply(b: Build, node: tuple[str, dict]) -> None:
    around(b, node[0], images=1, **node[1])  # some of these fail on larger batches by themselves


BEFORE = ("SkipLayerGuidanceDiT", "ModelSamplingFlux", "LoraLoaderModelOnly", "NAGuidance")


@each(STEERED, {kind: (kind, GUIDANCE[kind]) for kind in BEFORE})
def before_Apply(b: Build, node: tuple[str, dict]) -> None:
    around(b, node[0], before=True, **node[1])


@graph(STEERED, "sd3")
def skip_layer_guidance_of_sd3(b: Build) -> None:
    around(b, "SkipLayerGuidanceSD3", layers="1", scale=2.0, start_percent=0.0, end_percent=1.0)


@graph(STEERED, "sd3")
def shift_of_sd3(b: Build) -> None:
    around(b, "ModelSamplingSD3", shift=5.0)


@graph(STEERED)
def between_two_Apply(b: Build) -> None:
    shifted = b.add("ModelSamplingFlux", model=b.steered(), **GUIDANCE["ModelSamplingFlux"])
    skipping = b.add("SkipLayerGuidanceDiT", model=shifted, **GUIDANCE["SkipLayerGuidanceDiT"])
    b.show(b.sampled(b.steered(skipping, "second apply", dictionary="second-flux.safetensors")))


@graph(STEERED)
def several_guidances_at_once(b: Build) -> None:
    model = b.add("SkipLayerGuidanceDiT", model=b.steered(), **GUIDANCE["SkipLayerGuidanceDiT"])
    model = b.add("PerturbedAttentionGuidance", model=model)
    b.show(b.sampled(b.add("RescaleCFG", model=model), latent_image=b.latent(1)))


@each(STEERED, {"before": True, "after": False}, unseen=True)
def compiled(b: Build, before: bool) -> None:
    model = b.add("TestTinyModel", family=b.family, seed=7)  # not observed: hooks take long to compile
    if before:
        b.show(b.sampled(b.steered(b.add("TestCompileEagerly", model=model))))
    else:
        b.show(b.sampled(b.add("TestCompileEagerly", model=b.steered(model))))


@each(TOLD, {"EasyCache": "EasyCache", "LazyCache": "LazyCache"})
def steps_left_out_after_Apply(b: Build, kind: str) -> None:
    model = b.add(kind, model=b.steered(), **CACHE)
    b.show(b.sampled(model, latent_image=b.latent(1), steps=6))


@each(TOLD, {"EasyCache": "EasyCache", "LazyCache": "LazyCache"})
def steps_left_out_before_Apply(b: Build, kind: str) -> None:
    model = b.steered(b.add(kind, model=b.model(), **CACHE))
    b.show(b.sampled(model, latent_image=b.latent(1), steps=6))


@graph(TOLD, *BOTH)
def every_other_step_left_out(b: Build) -> None:
    around(b, "TestEveryOtherStep")


@each(STEERED, {"by prompt": "prompt"}, *BOTH)
def batch_run_in_parts(b: Build, by: str) -> None:
    around(b, "TestInParts", by=by)


@each(RULE, {"image": "image", "half": "half"})
def batch_run_in_parts_by(b: Build, by: str) -> None:
    around(b, "TestInParts", by=by)


@graph(STEERED, *BOTH)
def forward_pass_without_a_sampler(b: Build) -> None:
    around(b, "TestForwardPassOfItsOwn")


@graph(STEERED, *BOTH, broad=True)
def prompts_exchanged_in_the_run(b: Build) -> None:
    around(b, "TestPromptsExchanged")


@graph(TOLD)
def block_overwritten(b: Build) -> None:
    around(b, "TestOverwrite")


@each(TOLD, {"the positive": "positive", "all of them once more": "again"}, *BOTH)
def rows_that_go_around_the_wrappers(b: Build, rows: str) -> None:
    around(b, "TestGoAround", rows=rows)


@graph(TOLD, *BOTH, POCKET, judged=True)
def one_of_two_positives_goes_around_the_wrappers(b: Build) -> None:
    model = b.add("TestGoAround", model=b.steered(), rows="last positive")
    b.show(b.sampled(model, positive=together(b, b.text("risky"), b.text("safe"))))


@graph(TOLD)
def wrappers_stripped(b: Build) -> None:
    around(b, "TestStrip")


@graph(TOLD)
def picture_that_is_not_a_number(b: Build) -> None:
    around(b, "TestNotANumber")


@each(STEERED, {"along the width": 3, "along the height": 2})
def context_windows(b: Build, dim: int) -> None:
    given = {"context_length": 8, "context_overlap": 4, "dim": dim, "freenoise": False}
    model = b.add("ContextWindowsManual", model=b.steered(), **given)
    b.show(b.sampled(model, latent_image=b.latent(1, 96, 96)))


@graph(RULE)
def context_windows_along_the_batch(b: Build) -> None:
    given = {"context_length": 2, "context_overlap": 1, "dim": 0, "freenoise": False}
    b.show(b.sampled(b.add("ContextWindowsManual", model=b.steered(), **given), latent_image=b.latent(4)))


@graph(STEERED)
def merged_into_the_steered_model(b: Build) -> None:
    merge = {"model1": b.steered(), "model2": b.model("another", seed=6), "ratio": 0.5}
    b.show(b.sampled(b.add("ModelMergeSimple", **merge)))


@graph(TOLD)
def steered_model_merged_into_another(b: Build) -> None:
    merge = {"model1": b.model("another", seed=6), "model2": b.steered(), "ratio": 0.5}
    b.show(b.sampled(b.add("ModelMergeSimple", **merge)))


# Apply itself: several of it, positions, windows, strengths.


@graph(STEERED)
def two_Apply_in_series(b: Build) -> None:
    b.show(b.sampled(b.steered(b.steered(), "second apply")), of="second apply")


@graph(STEERED)
def two_Apply_in_series_with_other_dictionaries(b: Build) -> None:
    model = b.steered(b.steered(), "second apply", dictionary="second-flux.safetensors")
    b.show(b.sampled(model))


@graph(TOLD)
def receipt_of_another_Apply(b: Build) -> None:
    other = b.sampled(b.steered(name="second apply", strength=0.5), "other")
    b.show(b.sampled(b.steered()), of="second apply", after=other)


SELECT = {"operator": "as planned", "positions": ""}
BY_HAND = {"select": "by hand", "operator": "repel", "form": "residual", "strength": 1.0}
GROUPS = {
    "bind": {"select": "bind (double-stream blocks)"}, "render": {"select": "render (single-stream blocks)"},
}  # fmt: skip


@each(STEERED, GROUPS)
def selected(b: Build, group: dict) -> None:
    b.show(b.sampled(b.steered(select=SELECT | group)))


@each(RULE, {"text": {"select": "text"}, **GROUPS}, POCKET, judged=True)
def selected_of_the_pocket_model(b: Build, group: dict) -> None:
    """Fewer positions may not be enough: what is painted then may not be called clear."""
    b.show(b.sampled(b.steered(select=SELECT | group)))


@graph(STEERED, "sd3")
def one_position_by_hand(b: Build) -> None:
    b.show(b.sampled(b.steered(select=BY_HAND | {"positions": "joint.1.img"})))


@graph(RULE, never=r"^clear$|steered")
def window_that_is_never_entered(b: Build) -> None:
    window = {"positions": "double.1.img", "window_start": 0.02, "window_end": 0.0}
    b.show(b.sampled(b.steered(select=BY_HAND | window)))


@graph(STEERED, partly=True)
def window_of_the_second_half(b: Build) -> None:
    window = {"positions": "double.1.img", "window_start": 0.5, "window_end": 0.0}
    b.show(b.sampled(b.steered(select=BY_HAND | window)))


@graph(CLEAR)
def strength_that_moves_nothing(b: Build) -> None:
    b.show(b.sampled(b.steered(strength=1e-12)))


@graph(STEERED, never=r"weapons (found at step \d+, )?steered")
def plan_for_one_domain_only(b: Build) -> None:
    b.show(b.sampled(b.steered(dictionary="shock-only-flux.safetensors")))


# One prompt after another: what stays from before. The last is judged.


@graph(STEERED, *BOTH)
def queued_again_with_another_seed(b: Build) -> None:
    b.simple()
    b.queue()
    b.change("sampler", seed=4)


@graph(STEERED)
def queued_again_with_another_file_name(b: Build) -> None:
    """Then Apply, the sampler and the receipt come out of ComfyUI's cache."""
    b.simple()
    b.queue()
    b.change("receipt saved", filename_prefix="another")


@graph(CLEAR, POCKET, judged=True)
def queued_again_with_a_harmless_prompt(b: Build) -> None:
    b.simple()
    b.queue()
    b.change("sampler", positive=b.text("safe"))


@graph(STEERED, POCKET, judged=True)
def back_to_an_earlier_prompt(b: Build) -> None:
    b.simple()
    b.queue()
    b.change("sampler", positive=b.text("safe"))
    b.queue()
    b.change("sampler", positive=b.text("risky"))


@graph(STEERED, POCKET)
def back_to_an_earlier_prompt_with_a_new_receipt(b: Build) -> None:
    """The picture is still there, and the receipt on what has become of it is made anew."""
    made = b.sampled(b.steered())
    b.add("SaveLatent", "used", samples=made)
    b.queue()
    b.change("sampler", positive=b.text("safe"))
    b.queue()
    b.change("sampler", positive=b.text("risky"))
    b.show_pictures(b.add("ImageInvert", image=b.decoded(made)))


@graph(STEERED)
def receipt_added_later(b: Build) -> None:
    made = b.sampled(b.steered())
    b.add("SaveLatent", "used", samples=made)
    b.queue()
    b.show(made)


@graph(TOLD, *BOTH, POCKET, judged=True)
def reconnected_to_the_plain_model(b: Build) -> None:
    b.simple()
    b.queue()
    b.change("sampler", model=b.model())


@graph(TOLD)
def queued_again_with_a_switch_that_nothing_decides(b: Build) -> None:
    """The same prompt twice: the steered model the first time, the plain one the second."""
    given = {"first": b.steered(), "second": b.model(), "run": b.run}
    b.show(b.sampled(b.add("TestTakesTurns", **given)))
    b.queue()


@graph(TOLD)
def merged_into_another_after_a_steered_run(b: Build) -> None:
    b.simple()
    b.queue()
    merge = {"model1": b.model("another", seed=6), "model2": b.steered(), "ratio": 0.5}
    b.change("sampler", model=b.add("ModelMergeSimple", **merge))


@graph(TOLD)
def denoise_of_zero_after_a_steered_run(b: Build) -> None:
    b.simple()
    b.queue()
    b.change("sampler", denoise=0.0)


@graph(TOLD)
def wrappers_stripped_after_a_steered_run(b: Build) -> None:
    b.simple()
    b.queue()
    b.change("sampler", model=b.add("TestStrip", model=b.steered()))


@graph(TOLD)
def another_picture_after_a_steered_run(b: Build) -> None:
    b.simple()
    b.queue()
    b.nodes["receipt" if b.given is not None else "receipt saved"]["inputs"]["images"] = b.add(
        "EmptyImage", width=16, height=16, batch_size=2, color=0
    )
    b.shows["receipt"] = ["EmptyImage 1", 0]
    if b.given is None:
        b.change("receipt kept", images=["EmptyImage 1", 0])


AFTER = {"an interrupt": "TestInterrupted", "an error in a block": "TestFailing"}


@each(TOLD, AFTER, *BOTH)
def plain_model_after(b: Build, kind: str) -> None:
    b.show(b.sampled(b.add(kind, model=b.steered())))
    b.queue()
    b.change("sampler", model=b.model())


@each(STEERED, AFTER, *BOTH)
def steered_again_after(b: Build, kind: str) -> None:
    b.show(b.sampled(b.add(kind, model=b.steered())))
    b.queue()
    b.change("sampler", model=b.steered())


@graph(STEERED)
def steered_again_after_an_interrupt_in_the_second_of_two_samplers(b: Build) -> None:
    model = b.steered()
    first = b.sampled(model, "first")
    b.show(b.sampled(b.add("TestInterrupted", model=model), "second", latent_image=first, denoise=0.5))
    b.queue()
    b.change("second", model=model)


@graph(TOLD)
def plain_model_after_a_stop(b: Build) -> None:
    b.show(b.sampled(b.steered(action="stop")))
    b.queue()
    b.change("sampler", model=b.model())


@graph(TOLD)
def plain_model_after_a_run_and_an_interrupt(b: Build) -> None:
    b.simple()
    b.queue()
    b.change("sampler", model=b.add("TestInterrupted", model=b.steered()), seed=4)
    b.queue()
    b.change("sampler", model=b.model())


def main(words: list[str]) -> int:
    """A line for each graph; the number of those with a fault."""
    comfyui = Path(os.environ["COMFYUI_PATH"])
    tried, wrong = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        server = Server(comfyui, Path(folder), arguments=KEEPING)
        write_files(Path(folder))
        try:
            server.wait()
            runner = Runner(server)
            for each in GRAPHS:
                if not all(word in str(each) for word in words):
                    continue
                if lacking := runner.lacks(each):
                    print(f"--  {each}: this ComfyUI has no {', '.join(lacking)}", flush=True)
                    continue
                tried += 1
                start = time.monotonic()
                try:
                    found, said = faults(each, runner)
                except AssertionError as error:
                    found, said = [str(error)], ""
                wrong += bool(found)
                took = time.monotonic() - start
                print(f"{'BAD' if found else 'ok '} {each} ({took:.1f} s): {said}", flush=True)
                for fault in found:
                    print(f"      - {fault}", flush=True)
        finally:
            server.stop()
    print(f"{wrong} of {tried} graphs have a fault")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
