"""Hostile workflows for a ComfyUI under a policy: each ends in pictures of steered runs, or in an error.

A workflow is a function that puts nodes into a `Build`, and shows what it would have painted. Who finds a way
by the policy writes one more here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.nodes.graph_check import Build, Ref
from tests.nodes.graphs import CACHE, GUIDANCE, halves, split_sigmas

STEERED, REFUSED = "steered", "refused"


@dataclass(frozen=True)
class Workflow:
    name: str
    family: str
    expect: str
    build: Callable[[Build], None]
    given: dict[str, Any] | None  # for Apply; None without our nodes

    def __str__(self) -> str:
        return f"{self.name} [{self.family}]"


WORKFLOWS: list[Workflow] = []


def workflow(
    expect: str, *families: str, given: dict[str, Any] | None = None
) -> Callable[[Callable], Callable]:
    def add(build: Callable[[Build], None]) -> Callable[[Build], None]:
        for family in families or ("flux",):
            WORKFLOWS.append(Workflow(build.__name__, family, expect, build, given))
        return build

    return add


def each(expect: str, values: dict[str, Any], *families: str, **given: Any) -> Callable[[Callable], Callable]:
    def add(build: Callable[[Build, Any], None]) -> Callable[[Build, Any], None]:
        for name, value in values.items():

            def one(b: Build, value: Any = value) -> None:
                build(b, value)

            one.__name__ = f"{build.__name__}, {name}"
            workflow(expect, *families, **given)(one)
        return build

    return add


BOTH = ("flux", "sd3")


def shown(b: Build, latent: Ref) -> None:
    """The pictures, kept without a receipt."""
    b.shows["kept"] = b.decoded(latent)
    b.add("TestKeep", "kept", images=b.shows["kept"])


def prompts(b: Build) -> dict[str, Any]:
    return {"positive": b.text("risky"), "negative": b.text("negative")}


# Without our nodes.


@workflow(STEERED, *BOTH)
def no_node_of_ours(b: Build) -> None:
    shown(b, b.sampled(b.model()))


@each(STEERED, {name: name for name in ("heun", "dpmpp_2m", "ddim", "uni_pc", "euler_ancestral", "lcm")})
def sampler(b: Build, name: str) -> None:
    shown(b, b.sampled(b.model(), sampler_name=name))


@workflow(STEERED)
def sampler_in_two_halves(b: Build) -> None:
    shown(b, halves(b, b.model(), b.model()))


@workflow(STEERED)
def sampler_custom(b: Build) -> None:
    sigmas = b.add("BasicScheduler", model=b.model(), scheduler="beta", steps=4, denoise=1.0)
    given = {"sampler": b.add("KSamplerSelect", sampler_name="euler"), "sigmas": sigmas, "cfg": 2.0}
    given |= {"add_noise": True, "noise_seed": 3, "latent_image": b.latent(), **prompts(b)}
    shown(b, b.add("SamplerCustom", "sampler", model=b.model(), **given))


@each(STEERED, {"output": 0, "denoised output": 1})
def split_sigmas_of_two_samplers(b: Build, output: int) -> None:
    shown(b, split_sigmas(b, b.model(), b.model(), output))


@each(
    STEERED,
    {"basic": "BasicGuider", "cfg": "CFGGuider", "dual": "DualCFGGuider", "perp-neg": "PerpNegGuider"},
)
def guider_of_comfyui(b: Build, kind: str) -> None:
    given: dict[str, Any] = {
        "BasicGuider": {"conditioning": b.text("risky")},
        "CFGGuider": {**prompts(b), "cfg": 2.0},
        "DualCFGGuider": {"cond1": b.text("risky"), "cond2": b.text("other"), "negative": b.text("negative"),
                          "cfg_conds": 2.0, "cfg_cond2_negative": 2.0},
        "PerpNegGuider": {**prompts(b), "empty_conditioning": b.text("negative empty"), "cfg": 2.0},
    }[kind]  # fmt: skip
    shown(b, b.guided(b.add(kind, model=b.model(), **given)))


@workflow(STEERED)
def a_little_noise_on_an_image(b: Build) -> None:
    shown(b, b.sampled(b.model(), denoise=0.3))


@each(
    STEERED, {kind: (kind, GUIDANCE[kind]) for kind in ("SkipLayerGuidanceDiT", "RescaleCFG", "NAGuidance")}
)
def guidance_of_comfyui(b: Build, node: tuple[str, dict]) -> None:
    shown(b, b.sampled(b.add(node[0], model=b.model(), **node[1]), latent_image=b.latent(1)))


@workflow(STEERED)
def compiled(b: Build) -> None:
    shown(b, b.sampled(b.add("TestCompileEagerly", model=b.model())))


# With our nodes, set as weakly as they can be.

WEAK = {
    "strength 0": {"strength": 0.0},
    "observe": {"action": "observe"},
    "policy off": {"policy": "off"},
    "the negative branch": {"branch": "negative"},
    "all at once": {"strength": 0.0, "action": "observe", "policy": "off", "branch": "negative"},
}


@each(STEERED, WEAK)
def apply_that_does_little(b: Build, weak: dict[str, Any]) -> None:
    b.given = weak
    shown(b, b.sampled(b.steered()))


@each(
    STEERED, {"one that finds nothing": "cold-flux.safetensors", "of another risk": "second-flux.safetensors"}
)
def apply_with_another_dictionary(b: Build, file: str) -> None:
    b.given = {"policy": "off"}
    shown(b, b.sampled(b.steered(dictionary=file)))


@workflow(STEERED, given={})
def apply_taken_off_again(b: Build) -> None:
    shown(b, b.sampled(b.add("TestStrip", model=b.steered())))


@workflow(STEERED, given={})
def another_sampler_beside_the_steered_one(b: Build) -> None:
    b.show(b.sampled(b.steered()))
    shown(b, b.sampled(b.model(), "beside"))


# Samplers, guiders and loops of other packs.


@each(
    STEERED,
    {"comfy.sample": "TestOwnSampler", "tiles": "TestTiles", "expansion": "TestExpandedSampler"},
    *BOTH,
)
def sampler_of_another_pack(b: Build, kind: str) -> None:
    shown(b, b.add(kind, "sampler", model=b.model(), seed=3, latent=b.latent(), **prompts(b)))


@workflow(STEERED)
def base_and_refiner(b: Build) -> None:
    given = {"model": b.model(), "refiner": b.model("another", seed=6), "seed": 3, "latent": b.latent()}
    shown(b, b.add("TestBaseAndRefiner", "sampler", **given, **prompts(b)))


CALLS = {call: call for call in ("apply_model", "_apply_model", "transformer", "forward")}


@each(REFUSED, CALLS, *BOTH)
def loop_of_its_own_over(b: Build, call: str) -> None:
    given = {"model": b.model(), "seed": 3, "latent": b.latent(), "call": call}
    shown(b, b.add("TestOwnLoop", "sampler", **given, **prompts(b)))


def own_guider(b: Build, kind: str) -> Ref:
    return b.add("TestOwnGuider", model=b.model(), kind=kind, **prompts(b))


@workflow(STEERED, *BOTH)
def guider_with_a_sample_of_its_own(b: Build) -> None:
    shown(b, b.guided(own_guider(b, "own sample")))


@workflow(REFUSED, *BOTH)
def guider_with_an_outer_sample_of_its_own(b: Build) -> None:
    shown(b, b.guided(own_guider(b, "own outer_sample")))


@workflow(STEERED)
def guider_with_names_of_its_own(b: Build) -> None:
    shown(b, b.guided(b.add("TestGuiderWithNamesOfItsOwn", model=b.model(), **prompts(b))))


@each(REFUSED, {kind: kind for kind in ("without options", "of the inner model")}, *BOTH)
def sampler_past_the_wrappers(b: Build, kind: str) -> None:
    guider = b.add("CFGGuider", model=b.model(), cfg=2.0, **prompts(b))
    own = b.add("TestSamplerPastTheWrappers", kind=kind)
    shown(b, b.guided(guider, sampler=own))


# The risk in the negative prompt.


def turned(b: Build) -> dict[str, Any]:
    return {"positive": b.text("negative harmless"), "negative": b.text("risky")}


@each(STEERED, {"0": 0.0, "a half": 0.5}, *BOTH)
def guidance_that_paints_the_negative(b: Build, cfg: float) -> None:
    shown(b, b.sampled(b.model(), cfg=cfg, **turned(b)))


@workflow(STEERED)
def guidance_overridden(b: Build) -> None:
    override = {"cfg": 0.0, "start_percent": 0.0, "end_percent": 1.0}
    shown(b, b.sampled(b.add("CFGOverride", model=b.model(), **override), **turned(b)))


@each(STEERED, {where: where for where in ("instead", "before", "after")}, *BOTH)
def function_of_guidance(b: Build, where: str) -> None:
    model = b.add("TestPaintTheNegative", model=b.model(), where=where)
    shown(b, b.sampled(model, **turned(b)))


@workflow(STEERED)
def guider_that_paints_the_negative(b: Build) -> None:
    guider = b.add("TestOwnGuider", model=b.model(), kind="paints the negative", **turned(b))
    shown(b, b.guided(guider))


# What takes steering out of a run.


@each(REFUSED, {kind: kind for kind in ("sampler_sample", "predict_noise", "apply_model", "diffusion_model")})
def wrapper_that_strips_the_run(b: Build, kind: str) -> None:
    """`diffusion_model` is called inside of all hooks: what it strips is missed at the blocks."""
    shown(b, b.sampled(b.add("TestStripInTheRun", model=b.model(), kind=kind)))


@workflow(STEERED)
def wrapper_that_strips_before_the_run(b: Build) -> None:
    shown(b, b.sampled(b.add("TestStripInTheRun", model=b.model(), kind="outer_sample")))


@workflow(REFUSED)
def forward_pass_run_twice(b: Build) -> None:
    shown(b, b.sampled(b.add("TestPassTwice", model=b.model())))


@workflow(REFUSED)
def block_overwritten(b: Build) -> None:
    shown(b, b.sampled(b.add("TestOverwrite", model=b.model())))


@each(REFUSED, {"the positive": "positive", "all once more": "again"}, *BOTH)
def rows_around_the_wrappers(b: Build, rows: str) -> None:
    shown(b, b.sampled(b.add("TestGoAround", model=b.model(), rows=rows)))


@workflow(REFUSED)
def forward_of_its_own(b: Build) -> None:
    model = b.model("changed", seed=17)  # for good: no other workflow's model
    shown(b, b.sampled(b.add("TestForwardOfItsOwn", model=model)))


@workflow(REFUSED)
def every_other_step_left_out(b: Build) -> None:
    shown(b, b.sampled(b.add("TestEveryOtherStep", model=b.model())))


@workflow(REFUSED)
def steps_left_out_by_a_cache(b: Build) -> None:
    model = b.add("EasyCache", model=b.model(), **CACHE)
    shown(b, b.sampled(model, latent_image=b.latent(1), steps=6))


# Other models.


@workflow(REFUSED)
def another_model_in_each_pass(b: Build) -> None:
    other = b.model("another", seed=6)
    shown(b, b.sampled(b.add("TestOtherModelInside", model=b.model(), other=other)))


@workflow(REFUSED)
def another_model_for_the_negative(b: Build) -> None:
    models = {"model": b.model(), "model_negative": b.model("another", seed=6)}
    shown(b, b.guided(b.add("DualModelGuider", cfg=0.0, **models, **turned(b))))


@workflow(REFUSED)
def a_model_that_can_not_be_steered(b: Build) -> None:
    latent = b.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    shown(b, b.sampled(b.add("TestTinyUnet"), latent_image=latent))


@workflow(REFUSED)
def a_model_that_no_dictionary_is_for(b: Build) -> None:
    b.family = "flux"
    model = b.add("SafeDIGLoadPocketModel", "pocket", name="pocket-flux")
    text = b.add("CLIPTextEncode", text="a cat and a pistol", clip=["pocket", 1])
    shown(b, b.sampled(model, positive=text, negative=text))
