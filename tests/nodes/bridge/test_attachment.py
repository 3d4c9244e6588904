"""The contract between the steering and a ComfyUI model, in a stand-in and in the real one."""

from __future__ import annotations

import copy
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safedig_core.dictionary.dictionary import Action
from tests.nodes.conftest import pack_module
from tests.tiny import APART, TINIES, rewritten, write_dictionary

patching = pack_module("nodes.bridge.steered")
attachment_module = pack_module("nodes.bridge.attachment")
steering_module = pack_module("safedig_core.steering.steering")
Steering, RiskFound = steering_module.Steering, steering_module.RiskFound
NotSteered = attachment_module.NotSteered

BLOCK = {name: f"{tiny.traits.kinds[0]}.1.img" for name, tiny in TINIES.items()}
EVERYWHERE = {name: list(tiny.positions()) for name, tiny in TINIES.items()}
NEGATIVE, PROMPT, OTHER = 99, 1, 2


@pytest.fixture
def build(tmp_path: Path, family: str):
    """A Steering of a random dictionary at the given positions."""

    def make(
        positions: list[str] | None = None, *, strength: float = 1.0, form: str = "residual", **options: Any
    ):
        names = positions or [BLOCK[family]]
        of_file = ("threshold", "gate_window", "domains", "harmful")
        written = {k: options.pop(k) for k in of_file if k in options}
        window = options.pop("window", (1.0, 0.0))
        plan = [Action(p, "repel", form, strength, window) for p in names]
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        write_dictionary(path, plan, architecture=TINIES[family], **written)
        return open_steering(path, **options)

    return make


def open_steering(path: Path, **options: Any) -> Any:
    return Steering(pack_module("safedig_core.dictionary.dictionary").Dictionary.open(path), **options)


def sample(world: Any, model: Any, **options: Any) -> torch.Tensor:
    return world.sample(model, [world.prompt(PROMPT)], [world.prompt(NEGATIVE)], **options)


@contextmanager
def hooked(model: Any, family: str, steering: Any, images: int):
    """The same steering through torch's own forward hooks: what ComfyUI's patches must come to."""
    transformer, traits = model.model.diffusion_model, TINIES[family].traits
    kind, joint = traits.kinds[0], family == "sd3"
    rows = slice(images, 2 * images)  # the negative prompt's come first
    sigmas = torch.linspace(1, 0, 5).tolist()
    count = iter(range(100))

    def step(module: Any, args: Any, kwargs: Any = None) -> None:
        index = next(count)
        steering.step(index, sigmas[index], rows)

    def steer(name: str, a: torch.Tensor) -> torch.Tensor:
        return steering(name, a) if name in steering.positions else a

    def double(i: int):
        def hook(module: Any, args: Any, out: Any) -> Any:
            image, text = out[::-1] if joint else out
            if text is not None:
                text = steer(f"{kind}.{i}.txt", text)
            image = steer(f"{kind}.{i}.img", image)
            return (text, image) if joint else (image, text)

        return hook

    def single(i: int):
        def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            text = max(6, traits.least_tokens)
            return torch.cat(
                [steer(f"single.{i}.txt", out[:, :text]), steer(f"single.{i}.img", out[:, text:])], 1
            )

        return hook

    entry = transformer.context_embedder if joint else transformer.txt_in
    handles = [
        transformer.register_forward_pre_hook(step, with_kwargs=True),
        entry.register_forward_pre_hook(lambda m, args: (steer("text", args[0]), *args[1:])),
    ]
    if TINIES[family].pooled_width:
        vector = transformer.y_embedder if joint else transformer.vector_in
        handles.append(
            vector.register_forward_pre_hook(lambda m, args: steer("pooled", args[0][:, None])[:, 0])
        )
    blocks = getattr(transformer, f"{kind}_blocks")
    handles += [block.register_forward_hook(double(i)) for i, block in enumerate(blocks)]
    if not joint:
        handles += [b.register_forward_hook(single(i)) for i, b in enumerate(transformer.single_blocks)]
    steering.begin(images, 4, torch.device("cpu"))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_steers_as_hooks_on_the_modules_would(world: Any, family: str, build: Any) -> None:
    model = world.model(family)
    plain = sample(world, model, images=2)
    for position in EVERYWHERE[family]:
        steering = build([position])
        steered, attachment = patching.attach(model, steering)
        out = sample(world, steered, images=2)
        by_hooks = build([position])
        with hooked(model, family, by_hooks.run(), images=2):
            expected = sample(world, model, images=2)
        last = position == "single.1.txt"  # what leaves the last block as text goes nowhere
        assert torch.equal(out, plain) == last, position
        assert sum(map(sum, attachment.last.result["tokens_moved"][0])) > 0
        torch.testing.assert_close(out, expected, msg=position)
        assert attachment.last.result["calls"] == [[1, 1, 1, 1]]


def test_of_a_wide_pooled_vector_flux_reads_a_part(world: Any, family: str, build: Any) -> None:
    if family != "flux":
        pytest.skip("SD3.5 reads all of it, others nothing")
    model = world.model(family)
    prompts = [world.prompt(PROMPT, wide=12)], [world.prompt(NEGATIVE, wide=12)]
    plain = world.sample(model, *prompts)
    steered, attachment = patching.attach(model, build(["pooled"]))
    assert not torch.equal(world.sample(steered, *prompts), plain)
    assert attachment.last.result["calls"] == [[1, 1, 1, 1]]
    idle, _ = patching.attach(model, build(["pooled"], threshold=1e4))
    assert torch.equal(world.sample(idle, *prompts), plain)


VECTORS = {  # what another node leaves of the pooled vectors
    "one for all rows": lambda y: y[:1],  # the model spreads it: whose it is can't be told
    "none": lambda y: None,
}


@pytest.mark.parametrize("vectors", VECTORS)
def test_pooled_vectors_that_are_not_one_a_row_are_told(
    world: Any, family: str, build: Any, vectors: str
) -> None:
    if not TINIES[family].pooled_width:
        pytest.skip("it takes no vector")

    def change(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return executor(*args, **kwargs | {"y": VECTORS[vectors](kwargs["y"])})

    for policy in ("block", "warn"):
        steering = build(["pooled", BLOCK[family]])
        model, attachment = patching.attach(world.model(family), steering, policy=policy)
        model.add_wrapper_with_key("apply_model", "some_node", change)
        if policy == "block":
            with pytest.raises(NotSteered, match=r"step 1: pooled not reached.*some_node"):
                sample(world, model, images=2)
        else:
            assert sample(world, model, images=2).isfinite().all()
            assert len(attachment.last.problems) == 4


def test_the_original_model_is_not_touched(world: Any, family: str, build: Any) -> None:
    model = world.model(family)
    before = copy.deepcopy(model.model_options)
    plain = sample(world, model)
    steered, _ = patching.attach(model, build(EVERYWHERE[family]))
    assert not torch.equal(sample(world, steered), plain)
    assert torch.equal(sample(world, model), plain)
    assert model.model_options == before
    assert not model.wrappers and not model.additional_models
    assert model.model is steered.model


@pytest.mark.parametrize(
    "change",
    [
        {"strength": 0.0},
        {"threshold": 2e5},
        {"window": (1e-6, 0.0)},
        {"modes": {"weapons": "observe"}},
    ],
    ids=["strength 0", "gate closed", "outside the window", "observe"],
)
@pytest.mark.parametrize("form", ["residual", "paper"])
def test_no_ops_keep_every_bit(world: Any, family: str, build: Any, change: dict, form: str) -> None:
    model = world.model(family)
    steered, attachment = patching.attach(model, build(EVERYWHERE[family], form=form, **change))
    for images, together in ((2, True), (2, False)):
        out = sample(world, steered, images=images, together=together)
        assert torch.equal(out, sample(world, model, images=images, together=together))
    assert not attachment.last.problems


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(world: Any, family: str, build: Any, dtype: torch.dtype) -> None:
    model = world.model(family, dtype)
    plain = sample(world, model)
    steered, _ = patching.attach(model, build())
    out = sample(world, steered)
    assert out.isfinite().all() and not torch.equal(out, plain)
    idle, _ = patching.attach(model, build(EVERYWHERE[family], threshold=2e5))
    assert torch.equal(sample(world, idle), plain)


def constant(amount: float, seen: list):
    """Another node's replacement of a block, which calls the block."""

    def patch(args: dict, extra: dict) -> dict:
        seen.append(args["img"].shape)
        out = extra["original_block"](args)
        return {**out, "img": out["img"] + amount}

    return patch


def test_another_replacement_of_the_block_is_called_whichever_came_first(
    world: Any, family: str, build: Any
) -> None:
    model, seen, results = world.model(family), [], []
    first = model.clone()
    first.set_model_patch_replace(constant(0.5, seen), "dit", "double_block", 1)
    results.append(sample(world, patching.attach(first, build())[0]))
    second, _ = patching.attach(model, build())
    second.set_model_patch_replace(constant(0.5, seen), "dit", "double_block", 1)
    results.append(sample(world, second))
    assert len(seen) == 8
    assert torch.equal(*results)
    alone = patching.attach(model, build())[0]
    assert not torch.equal(results[0], sample(world, first))
    assert not torch.equal(results[0], sample(world, alone))


def test_two_apply_nodes_both_act(world: Any, family: str, build: Any) -> None:
    model = world.model(family)
    both = sample(world, patching.attach(model, build(["text", BLOCK[family]]))[0])
    one, _ = patching.attach(model, build(["text"]))
    two, second = patching.attach(one, build([BLOCK[family]]))
    # write_dictionary seeds an SAE by its place in the plan: steer at BLOCK as the second one there
    assert not torch.equal(sample(world, two), sample(world, one))
    assert not torch.equal(both, sample(world, model))
    assert second.last.result["calls"] == [[1, 1, 1, 1]]
    assert len(two.get_additional_models_with_key("safedig")) == 2

    twice = patching.attach(patching.attach(model, build(strength=0.5))[0], build(strength=0.5))[0]
    assert not torch.equal(
        sample(world, twice), sample(world, patching.attach(model, build(strength=0.5))[0])
    )


def test_each_image_of_a_batch_has_its_own_gate(world: Any, family: str, build: Any) -> None:
    model = world.model(family)
    _, watch = (attached := patching.attach(model, build(threshold=1e4)))
    plain = sample(world, attached[0], images=3)
    evidence = [v["weapons"]["evidence"] for v in watch.last.result["images"]]
    low, high = sorted(evidence)[0], sorted(evidence)[-1]
    assert low < high
    steered, attachment = patching.attach(model, build(threshold=(sorted(evidence)[-2] + high) / 2))
    out = sample(world, steered, images=3)
    opened = [v["weapons"]["found_at_step"] is not None for v in attachment.last.result["images"]]
    assert opened == [e == high for e in evidence]
    same = [torch.equal(a, b) for a, b in zip(out, plain, strict=True)]
    assert same == [not o for o in opened]


@pytest.mark.parametrize("together", [True, False], ids=["one pass", "a pass each"])
def test_branches(world: Any, family: str, build: Any, together: bool) -> None:
    """Whichever branch is steered, the other one's activations stay as they are."""
    model = world.model(family)
    changed: dict[str, list[bool]] = {}
    recorded: dict[str, list[torch.Tensor]] = {}
    block = 1
    for branch in ("none", "positive", "negative", "both"):
        steering = build([BLOCK[family].replace("1", "0")], threshold=0.0)
        steered = model if branch == "none" else patching.attach(model, steering, branch=branch)[0]
        steered, inputs = steered.clone(), []

        def record(args: dict, extra: dict, inputs: list = inputs) -> dict:
            inputs.append(args["img"].clone())
            return extra["original_block"](args)

        steered.set_model_patch_replace(record, "dit", "double_block", block)
        sample(world, steered, steps=1, together=together)
        recorded[branch] = list(torch.cat(inputs))
        changed[branch] = [
            not torch.equal(a, b) for a, b in zip(recorded[branch], recorded["none"], strict=True)
        ]
    positive = changed["positive"]
    assert sorted(positive) == [False, True]
    assert changed["negative"] == [not c for c in positive]
    assert changed["both"] == [True, True]


def test_without_guidance_the_prompt_is_steered(world: Any, family: str, build: Any) -> None:
    model = world.model(family)
    steered, attachment = patching.attach(model, build())
    assert not torch.equal(sample(world, steered, cfg=1.0), sample(world, model, cfg=1.0))
    assert attachment.last.result["calls"] == [[1, 1, 1, 1]]
    steered, _ = patching.attach(model, build(), branch="negative")
    with pytest.raises(NotSteered, match=r"step 1 went by without a forward pass of the negative prompt"):
        sample(world, steered, cfg=1.0)


def test_two_positive_prompts_are_both_steered(world: Any, family: str, build: Any) -> None:
    model = world.model(family)
    steered, attachment = patching.attach(model, build())
    prompts = [world.prompt(PROMPT), world.prompt(OTHER)]
    for together in (True, False):
        out = world.sample(steered, prompts, images=2, together=together)
        assert not torch.equal(out, world.sample(model, prompts, images=2, together=together))
        assert attachment.last.result["calls"] == [[2, 2, 2, 2]]


def test_reference_pictures_are_not_steered(world: Any, build: Any, family: str) -> None:
    if family not in ("flux", "flux2"):
        pytest.skip("it has no reference latents")
    model = world.model(family)
    for count in (1, 2):
        extra = world.references(model, count)
        prompt, negative = [world.prompt(PROMPT, **extra)], [world.prompt(NEGATIVE, **extra)]
        inputs: list[torch.Tensor] = []

        def record(args: dict, add: dict, inputs: list = inputs) -> dict:
            inputs.append(args["img"].clone())
            return add["original_block"](args)

        for steer in (False, True):
            steered = patching.attach(model, build(["double.0.img"]))[0] if steer else model.clone()
            steered.set_model_patch_replace(record, "dit", "double_block", 1)
            world.sample(steered, prompt, negative, steps=1)
        plain, moved = inputs
        assert moved.shape[1] == 16 * (1 + count)
        assert torch.equal(plain[:, 16:], moved[:, 16:])
        assert not torch.equal(plain[1, :16], moved[1, :16])
        single, attachment = patching.attach(model, build(["single.0.img", "single.1.txt"]))
        world.sample(single, prompt, negative)
        assert attachment.last.result["calls"] == [[1, 1, 1, 1]] * 2


def test_controlnet_residuals_come_after_the_steering(world: Any, family: str, build: Any) -> None:
    model = world.model(family)
    control = world.control(model, tokens=16)
    prompt, negative = [world.prompt(PROMPT, **control)], [world.prompt(NEGATIVE, **control)]
    plain = world.sample(model, prompt, negative)
    assert not torch.equal(plain, sample(world, model))
    idle, _ = patching.attach(model, build(EVERYWHERE[family], threshold=2e5))
    assert torch.equal(world.sample(idle, prompt, negative), plain)
    steered, attachment = patching.attach(model, build())
    assert not torch.equal(world.sample(steered, prompt, negative), plain)
    assert not attachment.last.problems


def test_queued_again_it_does_the_same(world: Any, family: str, build: Any) -> None:
    model = world.model(family)
    steered, attachment = patching.attach(model, build())
    first = sample(world, steered)
    said = attachment.last.result
    assert torch.equal(sample(world, steered), first)
    assert attachment.last.result == said and attachment.last.finished


def test_one_model_serves_samplers_of_other_sizes(world: Any, family: str, build: Any) -> None:
    steered, attachment = patching.attach(world.model(family), build(EVERYWHERE[family]))
    for images, size, steps in ((1, 8, 4), (3, 12, 2), (2, 10, 1)):
        assert sample(world, steered.clone(), images=images, size=size, steps=steps).shape[0] == images
        result = attachment.last.result
        assert len(result["sigmas"]) == steps
        assert attachment.last.map.shape == (images, (size // 2) ** 2)


def test_samplers_with_several_evaluations_a_step(world: Any, family: str, build: Any) -> None:
    steered, attachment = patching.attach(world.model(family), build())
    sample(world, steered, sampler="heun")
    run = attachment.last
    assert (run.steps, run.evaluations) == (4, 7)
    assert run.result["calls"] == [[1] * 7]
    assert run.result["sigmas"] == pytest.approx([1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])


def test_windows_are_in_noise_levels(world: Any, family: str, build: Any) -> None:
    """It acts in the plan's window, and looks in the gate's."""
    steering = build(window=(0.5, 0.25), gate_window=(0.75, 0.5), harmful=24)
    steered, attachment = patching.attach(world.model(family), steering)
    sample(world, steered)
    moved = attachment.last.result["tokens_moved"][0]
    assert [sum(step) > 0 for step in moved] == [False, False, True, True]
    evidence = [step[0][0] for step in attachment.last.result["evidence"]]
    assert evidence[0] == 0 and evidence[1] > 0 and evidence[3] == evidence[2]
    assert attachment.last.result["images"][0]["weapons"]["looked"] == 2


def test_stop_ends_the_run_at_the_first_step(world: Any, family: str, build: Any) -> None:
    steered, attachment = patching.attach(world.model(family), build(modes={"weapons": "stop"}))
    with pytest.raises(RiskFound, match=r"weapons found in picture 1 .* at step 1 "):
        sample(world, steered)
    assert attachment.last.evaluations == 0
    quiet, _ = patching.attach(world.model(family), build(modes={"weapons": "stop"}, threshold=1e4))
    assert sample(world, quiet).isfinite().all()


def skip_the_model(executor: Any, model: Any, conds: list, x: torch.Tensor, sigma: Any, options: dict):
    """What a step cache does: from the second step on, it answers in the model's place."""
    if sigma[0] > 0.8:
        return executor(model, conds, x, sigma, options)
    return [0.5 * x for _ in conds]


def skip_the_step(executor: Any, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any):
    return executor(x, sigma, *args, **kwargs) if sigma[0] > 0.8 else 0.5 * x


SKIPS = {"calc_cond_batch": skip_the_model, "predict_noise": skip_the_step}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", SKIPS)
def test_a_skipped_step_is_refused_or_reported(
    world: Any, family: str, build: Any, kind: str, before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def cached(policy: str) -> tuple[Any, Any]:
        model = world.model(family)
        if before:
            model.add_wrapper_with_key(kind, "some_cache", SKIPS[kind])
        model, attachment = patching.attach(model, build(), policy=policy, name="Apply (node 3)")
        if not before:
            model.add_wrapper_with_key(kind, "some_cache", SKIPS[kind])
        return model, attachment

    with pytest.raises(NotSteered, match=r"^Apply \(node 3\): .* step 2 .* skipped.*some_cache"):
        sample(world, cached("block")[0])
    for policy, warnings in (("warn", 1), ("off", 0)):
        caplog.clear()
        model, attachment = cached(policy)
        with caplog.at_level(logging.WARNING, "safedig"):
            assert sample(world, model).isfinite().all()
        assert len(caplog.records) == warnings
        assert len(attachment.last.problems) == 3


def test_an_overwritten_block_is_refused_or_reported(world: Any, build: Any, family: str) -> None:
    if family == "sd3":
        pytest.skip("SD3.5 lets no wrapper in between the hooks and its blocks")

    def overwrite(executor: Any, *args: Any, **kwargs: Any) -> Any:
        """A later node that sets a block's replacement while the model runs."""
        options = kwargs.get("transformer_options") or next(a for a in args if isinstance(a, dict))
        blocks = options["patches_replace"]["dit"] = dict(options["patches_replace"]["dit"])
        blocks["double_block", 1] = constant(0.0, [])
        return executor(*args, **kwargs)

    for policy in ("block", "warn"):
        model, attachment = patching.attach(world.model(family), build(), policy=policy)
        model.add_wrapper_with_key("diffusion_model", "a_later_node", overwrite)
        if policy == "block":
            with pytest.raises(NotSteered, match=r"step 1: double.1.img not reached.*a_later_node"):
                sample(world, model)
        else:
            assert sample(world, model).isfinite().all()
            assert len(attachment.last.problems) == 4


@pytest.mark.parametrize("kind", ["sampler_sample", "predict_noise", "apply_model"])
def test_removed_wrappers_are_refused_or_reported(world: Any, family: str, build: Any, kind: str) -> None:
    plain = sample(world, world.model(family))
    for policy in ("block", "warn"):
        model, attachment = patching.attach(world.model(family), build(), policy=policy)
        model.remove_wrappers_with_key(kind, "safedig")
        if policy == "block":
            with pytest.raises(NotSteered, match=f"another node removed its {kind} wrapper"):
                sample(world, model)
        else:
            assert torch.equal(sample(world, model), plain)
            assert attachment.last.problems


def test_without_its_guard_the_model_refuses_to_run(world: Any, family: str, build: Any) -> None:
    model, _ = patching.attach(world.model(family), build())
    model.remove_wrappers_with_key("outer_sample", "safedig")
    with pytest.raises(NotSteered, match="outside a run"):
        sample(world, model)


def test_another_model_under_the_same_wrappers_is_refused(world: Any, family: str, build: Any) -> None:
    other = "flux" if family == "sd3" else "sd3"
    for policy in ("block", "off"):
        model, _ = patching.attach(world.model(family), build(), policy=policy)
        model.model = world.model(other).model
        with pytest.raises(NotSteered, match=f"made for a {family} model .* put a {other} model"):
            sample(world, model)


def test_a_run_without_steps_is_no_fault(world: Any, family: str, build: Any) -> None:
    model, attachment = patching.attach(world.model(family), build())
    assert torch.equal(sample(world, model, steps=0), sample(world, world.model(family), steps=0))
    assert attachment.last.evaluations == 0 and not attachment.last.problems


def test_the_dictionary_is_a_managed_model(world: Any, family: str, build: Any) -> None:
    steering = build(EVERYWHERE[family], form="paper")
    model, _ = patching.attach(world.model(family), steering)
    (managed,) = model.get_additional_models_with_key("safedig")
    sample(world, model)
    held = {p.data_ptr() for p in managed.model.parameters()}
    used = [
        t for site in steering.sites.values() for t in (*vars(site).values(), *sum(site.delta.values(), ()))
    ]
    used = [t for t in used if isinstance(t, torch.Tensor)]
    assert {t.data_ptr() for t in used} == held  # a run leaves no copies behind, and nothing uncounted
    assert sum(p.numel() for p in managed.model.parameters()) == sum(t.numel() for t in used)


@pytest.mark.parametrize(
    ("model", "transformer"),
    [
        ("HiDream", "HiDreamImageTransformer2DModel"),
        ("Flux", "ComfyFluxWrapper"),
        ("SDXL", "UNetModel"),
        ("LongCatImage", "Flux"),
        ("ChromaRadiance", "ChromaRadiance"),
        ("AuraFlow", "MMDiT"),
        ("QwenImage", "QwenImageTransformer2DModel"),
        ("Lumina2", "NextDiT"),
    ],
)
def test_other_families_are_refused_by_name(model: str, transformer: str) -> None:
    module = type(transformer, (torch.nn.Module,), {})()
    patcher = SimpleNamespace(model=type(model, (), {})(), get_model_object=lambda name: module)
    called = " / ".join(dict.fromkeys((model, transformer)))
    with pytest.raises(ValueError, match=rf"This model \({called}\) can't be steered: .+\."):
        attachment_module.architecture_of(patcher)


def test_a_relative_in_a_familys_classes_is_refused(world: Any, family: str) -> None:
    """Ovis-Image is a Flux without a vector; a Flux with other latents is none that is known."""
    if family != "flux" or world.name != "stand-in":
        pytest.skip("made of the stand-in's parts")
    model = world.model("flux")
    assert attachment_module.architecture_of(model).to_json() == TINIES["flux"].to_json()
    vector, model.model.diffusion_model.vector_in = model.model.diffusion_model.vector_in, None
    with pytest.raises(ValueError, match=r"\(Flux\) can't be steered: FLUX.1 takes a pooled vector"):
        attachment_module.architecture_of(model)
    model.model.diffusion_model.vector_in = vector
    model.model.latent_format.latent_channels = 128
    with pytest.raises(ValueError, match=r"latents of 128 channels in patches of 2 are none of FLUX.1"):
        attachment_module.architecture_of(model)


def test_the_architecture_is_that_of_the_family(world: Any, family: str) -> None:
    assert attachment_module.architecture_of(world.model(family)).to_json() == TINIES[family].to_json()


def test_another_checkpoint_than_the_dictionarys_is_told(
    world: Any, family: str, build: Any, tmp_path: Path
) -> None:
    model, models = world.model(family), pack_module("nodes.bridge.models")
    mine = models.checkpoint_of(model)
    weight = f"diffusion_model.{TINIES[family].traits.text_entry}.weight"
    lora = model.clone()
    lora.add_patches({weight: ("diff", (torch.ones_like(model.model.get_parameter(weight)),))}, 1.0)
    assert models.checkpoint_of(lora).startswith(f"{mine}+")

    def told(made_on: str | None, sampled: Any) -> str:
        steering = build()
        if made_on is not None:
            steering.dictionary.card.training["checkpoint"] = made_on
        steered, attachment = patching.attach(sampled, steering)
        sample(world, steered, steps=1)
        return attachment.last.result["checkpoint"]

    assert told(None, model) == told(mine, model) == told(models.checkpoint_of(lora), lora) == ""
    assert f"another checkpoint, fine-tune or quantisation: 0123, and this model is {mine}" in told(
        "0123", model
    )
    assert "made with other patches (LoRA)" in told(mine, lora)
    half = world.model(family, torch.bfloat16)  # the same weights, rounded
    assert models.checkpoint_of(half) == mine


def test_a_dictionary_for_another_model_is_refused(world: Any, family: str, build: Any) -> None:
    other = {"flux": "flux2", "flux2": "chroma", "chroma": "flux", "sd3": "flux"}[family]
    with pytest.raises(ValueError, match=r"safetensors: made for a .* doesn't fit this .*"):
        patching.attach(world.model(other), build())


AREA, OTHER_AREA = (4, 8, 0, 0), (4, 8, 4, 0)  # height, width, top and left, in 8 pixels
REGIONS = {  # areas of the positive prompts, areas of the negative one, rows that are the positive prompt's
    "positive": ([AREA], [None], 1),
    "positive beside a whole one": ([None, AREA], [None], 2),
    "two positives": ([AREA, OTHER_AREA], [None], 2),
    "negative": ([None], [AREA], 2),
    "negative beside a whole one": ([None], [None, AREA], 2),
    "both, alike": ([AREA], [AREA], 1),
    "both, apart": ([AREA], [OTHER_AREA], 1),
}


def regional(world: Any, family: str, areas: list, seed: int) -> list:
    """Prompts of these areas, which ComfyUI counts in latents."""
    latent = TINIES[family].traits.pixels // 8
    given = [{} if area is None else {"area": tuple(n // latent for n in area)} for area in areas]
    return [world.prompt(seed + i, **each) for i, each in enumerate(given)]


@pytest.mark.parametrize("together", [True, False], ids=["one pass", "a pass each"])
@pytest.mark.parametrize("layout", REGIONS)
def test_every_part_of_a_regional_prompt_is_steered(
    world: Any, family: str, build: Any, layout: str, together: bool
) -> None:
    """ComfyUI copies what covers an area into the other list, with its uuid: no name of a branch."""
    positive, negative, rows = REGIONS[layout]
    prompts = regional(world, family, positive, 1), regional(world, family, negative, 99)
    model, calls = world.model(family), {}
    plain = world.sample(model, *prompts, together=together)
    for branch in ("positive", "negative", "both"):
        steered, attachment = patching.attach(model, build(), branch=branch)
        out = world.sample(steered, *prompts, together=together)
        assert not torch.equal(out, plain)
        calls[branch] = sum(attachment.last.result["calls"][0])
        assert not attachment.last.problems
    if layout != "both, apart":  # there, which of both gets a partner is ComfyUI's business
        assert calls["positive"] == 4 * rows
    assert calls["positive"] + calls["negative"] == calls["both"]


def test_prompts_that_take_turns_are_all_steered(world: Any, family: str, build: Any) -> None:
    turns = [world.prompt(1, **early(world)), world.prompt(2, **late(world))]
    steered, attachment = patching.attach(world.model(family), build())
    world.sample(steered, turns)
    assert attachment.last.result["calls"] == [[1, 1, 1, 1]] and not attachment.last.problems


def test_a_prompt_that_ends_early_is_told_by_its_cause(world: Any, family: str, build: Any) -> None:
    steered, attachment = patching.attach(world.model(family), build(), policy="warn")
    world.sample(steered, [world.prompt(1, **early(world))])
    assert attachment.last.problems and "range of timesteps" in attachment.last.problems[0]
    steered, _ = patching.attach(world.model(family), build())
    with pytest.raises(NotSteered, match="without a forward pass of the positive prompt"):
        world.sample(steered, [world.prompt(1, **early(world))])


def early(world: Any) -> dict:
    """Of a prompt for the first half of the noise levels, as each world says it."""
    return {"timestep_end": 0.6} if world.name == "stand-in" else {"start_percent": 0.0, "end_percent": 0.4}


def late(world: Any) -> dict:
    return {"timestep_start": 0.6} if world.name == "stand-in" else {"start_percent": 0.4, "end_percent": 1.0}


@pytest.mark.parametrize("policy", ["block", "warn"])
def test_a_prompt_that_goes_by_the_wrappers_is_noticed(
    world: Any, family: str, build: Any, policy: str
) -> None:
    """A node that runs one of two prompts itself, where no wrapper sees it."""

    def aside(executor: Any, model: Any, conds: list, x: torch.Tensor, sigma: Any, options: dict):
        kept = [group[:1] for group in conds]
        return executor(model, kept, x, sigma, options)

    model, attachment = patching.attach(world.model(family), build(), policy=policy)
    model.add_wrapper_with_key("calc_cond_batch", "aside", aside)
    prompts = [world.prompt(PROMPT), world.prompt(OTHER)]
    if policy == "block":
        with pytest.raises(NotSteered, match=r"step 1: 1 parts of the prompt went by the model.*aside"):
            world.sample(model, prompts)
        assert not attachment.last.finished
    else:
        world.sample(model, prompts)
        assert len(attachment.last.problems) == 4 and attachment.last.finished


@pytest.mark.parametrize("policy", ["block", "off"])
def test_a_pass_that_goes_by_the_wrappers_is_noticed(
    world: Any, family: str, build: Any, policy: str
) -> None:
    """All rows went the usual way, and then once more past it: it is the second answer that is painted."""

    def again(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        executor(x, t, *args, **kwargs)
        return executor.class_obj._apply_model(x, t, *args, **kwargs)

    model, attachment = patching.attach(world.model(family), build(), policy=policy)
    model.add_wrapper_with_key("apply_model", "another", again)
    if policy == "block":
        with pytest.raises(NotSteered, match="went past its wrappers.*another"):
            sample(world, model)
    else:
        assert torch.equal(sample(world, model), sample(world, world.model(family)))
        assert "past its wrappers" in attachment.last.problems[0]


@pytest.mark.parametrize(
    ("branch", "cfg", "told"),
    [("positive", 0.0, True), ("positive", 0.5, True), ("positive", 1.0, False), ("positive", 2.0, False),
     ("both", 0.5, False), ("negative", 0.5, False)],
)  # fmt: skip
def test_guidance_that_paints_the_other_prompt_is_told(
    world: Any, family: str, build: Any, branch: str, cfg: float, told: bool
) -> None:
    model, attachment = patching.attach(world.model(family), build(), branch=branch, policy="off")
    sample(world, model, cfg=cfg)
    assert any("the negative prompt is painted too" in p for p in attachment.last.problems) == told


class Watched:
    """What newer versions say about a block's allocations: whether they are watched."""

    watching = True

    @contextmanager
    def pause_malloc_graph(self):
        self.watching = False
        try:
            yield
        finally:
            self.watching = True


def test_steering_allocates_unwatched_where_blocks_are_watched(
    world: Any, family: str, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, seen = Watched(), []
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", watched)  # type: ignore[arg-type]
    steered, attachment = patching.attach(world.model(family), build(EVERYWHERE[family]))
    step = type(attachment.steering.run()).__call__

    def seeing(run: Any, position: str, a: torch.Tensor) -> torch.Tensor:
        seen.append(watched.watching)
        return step(run, position, a)

    monkeypatch.setattr(type(attachment.steering.run()), "__call__", seeing)
    sample(world, steered)
    assert len(seen) == 4 * len(EVERYWHERE[family]) and not any(seen)
    assert watched.watching


def test_the_dictionary_is_loaded_as_newer_versions_load(
    world: Any, family: str, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    patcher = sys.modules["comfy.model_patcher"]

    class Core(patcher.ModelPatcher):  # type: ignore[name-defined]
        pass

    monkeypatch.setattr(patcher, "CoreModelPatcher", Core, raising=False)
    _, attachment = patching.attach(world.model(family), build())
    assert type(attachment.weights) is Core


def test_where_the_text_ends_is_taken_from_the_version_that_tells(
    world: Any, family: str, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a double block's text was: another node may have made it longer since."""
    if family == "sd3" or world.name != "stand-in":
        pytest.skip("SD3.5 has no single blocks, and ComfyUI's text goes by its own positions")
    model = world.model(family)

    def longer(args: dict, extra: dict) -> dict:
        out = extra["original_block"](args)
        args["transformer_options"]["img_slice"] = [7, 7 + out["img"].shape[1]]
        return {**out, "txt": torch.cat([out["txt"], out["txt"][:, :1]], 1)}

    model.set_model_patch_replace(longer, "dit", "double_block", 1)
    seen: dict[str, set[int]] = {}
    steered, attachment = patching.attach(model, build(["single.0.txt", "single.0.img"]))
    step = type(attachment.steering.run()).__call__

    def seeing(run: Any, position: str, a: torch.Tensor) -> torch.Tensor:
        seen.setdefault(position, set()).add(a.shape[1])
        return step(run, position, a)

    monkeypatch.setattr(type(attachment.steering.run()), "__call__", seeing)
    sample(world, steered)
    assert seen == {"single.0.txt": {7}, "single.0.img": {16}}


@pytest.mark.parametrize("policy", ["block", "warn"])
def test_a_batch_that_something_cut_is_told(world: Any, family: str, build: Any, policy: str) -> None:
    def halves(executor: Any, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.cat([cut(executor, part, x, t, args, kwargs) for part in (slice(0, 3), slice(3, None))])

    def cut(executor: Any, part: slice, x: torch.Tensor, t: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        """The same call for some rows; what goes along by row is cut with them."""
        few = [a[part] if isinstance(a, torch.Tensor) and len(a) == len(x) else a for a in args]
        named = {
            k: a[part] if isinstance(a, torch.Tensor) and len(a) == len(x) else a for k, a in kwargs.items()
        }
        return executor(x[part], t[part], *few, **named)

    model, attachment = patching.attach(world.model(family), build(), policy=policy)
    model.add_wrapper_with_key("apply_model", "halves", halves)
    if policy == "block":
        with pytest.raises(
            NotSteered, match="3 rows for 2 prompts, where the run began with 2 images.*halves"
        ):
            sample(world, model, images=2)
    else:
        plain = world.model(family)
        plain.add_wrapper_with_key("apply_model", "halves", halves)
        assert torch.equal(sample(world, model, images=2), sample(world, plain, images=2))
        assert attachment.last.problems


def test_two_threads_on_one_attachment_are_refused(world: Any, family: str, build: Any) -> None:
    steered, attachment = patching.attach(world.model(family), build())
    inside, go_on = threading.Event(), threading.Event()

    def hold(executor: Any, *args: Any, **kwargs: Any) -> Any:
        inside.set()
        assert go_on.wait(60)
        return executor(*args, **kwargs)

    held = steered.clone()
    held.add_wrapper_with_key("sampler_sample", "hold", hold)
    expected = sample(world, patching.attach(world.model(family), build())[0])
    with ThreadPoolExecutor(1) as pool, torch.inference_mode():
        first = pool.submit(lambda: torch.inference_mode()(sample)(world, held))
        assert inside.wait(60)
        with pytest.raises(NotSteered, match="being sampled already"):
            sample(world, steered)
        go_on.set()
        assert torch.equal(first.result(60), expected)
    assert torch.equal(sample(world, steered), expected) and attachment.last.finished


def test_a_sampler_within_the_sampler_is_refused(world: Any, family: str, build: Any) -> None:
    steered, attachment = patching.attach(world.model(family), build())

    def again(executor: Any, *args: Any, **kwargs: Any) -> Any:
        sample(world, steered)
        return executor(*args, **kwargs)

    outer = steered.clone()
    outer.add_wrapper_with_key("sampler_sample", "again", again)
    with pytest.raises(NotSteered, match="being sampled already"):
        sample(world, outer)
    assert sample(world, steered).isfinite().all() and attachment.last.finished


def test_a_forward_pass_in_another_thread_is_refused(world: Any, family: str, build: Any) -> None:
    def elsewhere(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: torch.inference_mode()(executor)(*args, **kwargs)).result()

    steered, _ = patching.attach(world.model(family), build(), policy="off")
    steered.add_wrapper_with_key("calc_cond_batch", "elsewhere", elsewhere)
    with pytest.raises(NotSteered, match="called from another thread"):
        sample(world, steered)


@pytest.mark.parametrize("policy", ["block", "warn"])
def test_a_picture_that_is_not_finite_is_an_error(world: Any, family: str, build: Any, policy: str) -> None:
    def overflow(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return executor(*args, **kwargs) * float("nan")

    model, attachment = patching.attach(world.model(family), build(), policy=policy)
    model.add_wrapper_with_key("sampler_sample", "overflow", overflow)
    if policy == "block":
        with pytest.raises(NotSteered, match="numbers that are not finite"):
            sample(world, model)
    else:
        sample(world, model)
    assert "not finite" in attachment.last.problems[-1]


@pytest.mark.parametrize("policy", ["block", "warn"])
def test_what_other_domains_undo_was_not_steered_as_planned(
    world: Any, family: str, build: Any, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, attachment = patching.attach(world.model(family), build(), policy=policy)
    sample(world, model)
    assert not attachment.last.problems
    monkeypatch.setattr(steering_module, "LEAST_LEFT", 1.1)  # so that nothing is left of enough
    if policy == "block":
        with pytest.raises(NotSteered, match="weapons was undone by other domains"):
            sample(world, model)
    else:
        sample(world, model)
    assert "undone by other domains" in attachment.last.problems[-1]


@pytest.mark.parametrize("policy", ["block", "warn"])
@pytest.mark.parametrize("undone_first", [False, True])
def test_what_another_apply_node_undoes_was_not_steered_as_planned(
    world: Any, family: str, tmp_path: Path, policy: str, undone_first: bool
) -> None:
    plan = [Action(BLOCK[family], "repel", "residual", 1.0)]
    whole = write_dictionary(tmp_path / "d.safetensors", plan, architecture=TINIES[family])
    made = rewritten(whole, "apart.safetensors", lambda card: None, *APART)
    rows = made.sae(BLOCK[family]).decoder_weight

    def blend(card: Any) -> None:
        card.plan[:] = [Action(BLOCK[family], "blend", "residual", 1.0)]

    against = rewritten(made, "against.safetensors", blend, lambda _, delta: rows[: len(delta)])
    nodes = {"apart": "block" if policy == "block" else "warn", "against": "off"}
    model, attachments = world.model(family), {}
    plain = sample(world, model)
    alone, attachment = patching.attach(model, open_steering(made.path), policy="block")
    assert not torch.allclose(sample(world, alone), plain, atol=1e-3) and not attachment.last.problems
    for name in sorted(nodes, reverse=undone_first):
        path = {"apart": made, "against": against}[name].path
        model, attachments[name] = patching.attach(model, open_steering(path), policy=nodes[name], name=name)
    if policy == "block":
        with pytest.raises(NotSteered, match="apart.*weapons was undone by other domains"):
            sample(world, model)
        return
    torch.testing.assert_close(sample(world, model), plain, atol=1e-3, rtol=0)
    (problem,) = attachments["apart"].last.problems
    assert "weapons was undone by other domains" in problem
    (image,) = attachments["apart"].last.result["images"]
    assert image["weapons"]["left"] == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("fault", ["interrupt", "error in a block", "stop"])
def test_a_run_that_ended_early_is_not_finished(world: Any, family: str, build: Any, fault: str) -> None:
    steering = build(modes={"weapons": "stop"}) if fault == "stop" else build()
    steered, attachment = patching.attach(world.model(family), steering)
    ended = steered.clone()

    def end(executor: Any, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sigma[0] < 0.6:
            raise RuntimeError(fault)
        return executor(x, sigma, *args, **kwargs)

    ended.add_wrapper_with_key("predict_noise", "end", end)
    with pytest.raises(RuntimeError):
        sample(world, ended)
    assert not attachment.last.finished
    if fault != "stop":
        sample(world, steered)
        assert attachment.last.finished
