"""A ComfyUI model as a host for the core: what a tap is given, and what is refused."""

from __future__ import annotations

import gc
import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safedig_core.dictionary.dictionary import Action
from tests.nodes.conftest import pack_module
from tests.tiny import TINIES, write_dictionary

host_module = pack_module("nodes.bridge.host")
FAMILIES = pack_module("safedig_core.families").FAMILIES
taps = pack_module("safedig_core.hosts.taps")
NotSteered = pack_module("nodes.bridge.attachment").NotSteered
SETTINGS = host_module.SamplerSettings(4, 2.0, "euler", "simple", 64, 64, "a blur")
PROMPTS = ["a cat and a pistol", "a cat and a book", "a dog"]
BLOCK = {name: f"{tiny.traits.kinds[0]}.1.img" for name, tiny in TINIES.items()}


class Clip:
    """Encodes a prompt as 6 tokens, or more, of width 16 that its words decide."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def tokenize(self, text: str) -> dict[str, list[list[tuple[str, float]]]]:
        return {"words": [[(word, 1.0) for word in text.split(" ")]]}

    def encode_from_tokens_scheduled(self, tokens: Any) -> list:
        text = tokens if isinstance(tokens, str) else " ".join(word for word, _ in tokens["words"][0])
        self.encoded.append(text)
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
        g = torch.Generator().manual_seed(seed)
        length = max(6, len(text.split()))
        return [[torch.randn(1, length, 16, generator=g), {"pooled_output": torch.randn(1, 8, generator=g)}]]


def host_of(world: Any, model: Any, clip: Any, settings: Any = SETTINGS, batch: int = 2) -> Any:
    """A host whose model and CLIP are held as long as the test runs, as ComfyUI's cache holds them."""
    vars(world).setdefault("held", []).extend((model, clip))
    return host_module.ComfyHost(model, clip, settings, batch)


def make(world: Any, family: str, clip: Any = None, **changes: Any) -> Any:
    return host_of(world, world.model(family), clip or Clip(), replace(SETTINGS, **changes))


def recorder(positions: list[str], images: int, steps: tuple[int, ...] = (0, 1, 2, 3)) -> Any:
    """A tap that keeps all tokens."""
    return taps.RecordTap(
        {p: (lambda total: torch.arange(total).expand(images, -1)) for p in positions}, steps
    )


def test_the_tap_is_given_the_positive_rows_in_order(world: Any, family: str) -> None:
    host = make(world, family)
    tap = recorder(["text", BLOCK[family]], 3)
    host.sample(PROMPTS, [1, 2, 3], tap)
    sequences = torch.cat([Clip().encode_from_tokens_scheduled(p)[0][0] for p in PROMPTS]).bfloat16()
    tokens = max(6, host.architecture.traits.least_tokens)
    sequences = torch.nn.functional.pad(sequences, (0, 0, tokens - 6, 0))
    assert tap.activations["text"].shape == (3, 4, tokens, 16)
    for step in range(4):
        assert torch.equal(tap.activations["text"][:, step], sequences)
    assert tap.activations[BLOCK[family]].shape == (3, 4, 16, host.architecture.width)
    assert host.tokens()[BLOCK[family]] == 16 and host.tokens()["text"] == tokens


def test_text_states_are_what_the_prompts_positions_see(world: Any, family: str) -> None:
    clip = Clip()
    host = make(world, family, clip)
    tap = recorder([*host.architecture.positions()[: 2 if host.architecture.pooled_width else 1]], 3)
    sequence, pooled = host.text_states(PROMPTS)
    assert sequence.dtype == pooled.dtype == torch.float32 and host.unknown(PROMPTS) == PROMPTS
    host.sample(PROMPTS, [1, 2, 3], tap)
    assert torch.equal(tap.activations["text"][:, 3], sequence.bfloat16())
    assert pooled.shape == (3, host.architecture.pooled_width)
    if "pooled" in tap.positions:
        assert torch.equal(tap.activations["pooled"][:, 3], pooled[:, None].bfloat16())
        assert host.tokens()["pooled"] == 1
    done = len(clip.encoded)
    assert torch.equal(host.text_states(PROMPTS)[0], sequence) and len(clip.encoded) == done


def test_text_states_may_be_of_prompts_of_any_length(world: Any, family: str) -> None:
    host, prompts = make(world, family), ["a cat", "a cat on a mat in the hat of a dog"]
    sequence, pooled = host.text_states(prompts)
    least = host.architecture.traits.least_tokens
    assert sequence.shape == (2, max(11, least), 16) and pooled.shape == (2, host.architecture.pooled_width)
    short, long = (states[states.any(1)] for states in sequence)
    assert len(short) == 6 and len(long) == 11
    assert sequence[0, -5:].any() == bool(least)  # the model puts zeros in front, we put them behind
    names = host.prompt_tokens(prompts)
    assert [len(each) for each in names] == [max(2, least), max(11, least)]
    assert [each[-1] for each in names] == ["cat", "dog"]


def test_an_image_depends_on_its_prompt_and_seed_alone(world: Any, family: str) -> None:
    host = make(world, family)
    together = host.sample(PROMPTS, [5, 6, 5])
    for i, (prompt, seed) in enumerate(zip(PROMPTS, [5, 6, 5], strict=True)):
        torch.testing.assert_close(host.sample([prompt], [seed])[0], together[i], atol=1e-4, rtol=1e-4)
    assert not torch.equal(together[0], host.sample(PROMPTS[:1], [6])[0])


def test_a_tap_that_changes_nothing_keeps_every_bit(world: Any, family: str) -> None:
    host = make(world, family)
    plain = host.sample(PROMPTS, [1, 2, 3])
    assert torch.equal(
        host.sample(PROMPTS, [1, 2, 3], recorder(list(host.architecture.positions()), 3)), plain
    )


class Scale:
    """Multiplies the activations of one position."""

    def __init__(self, position: str, factor: float):
        self.positions, self.factor, self.seen = (position,), factor, []

    def begin(self, images: int, steps: int, device: torch.device) -> None:
        pass

    def step(self, index: int, sigma: float, rows: slice) -> None:
        self.seen.append((index, sigma))
        self._rows = rows

    def __call__(self, position: str, a: Tensor) -> Tensor:
        out = a.clone()
        out[self._rows] *= self.factor
        return out


def test_a_tap_may_change_what_it_is_given(world: Any, family: str) -> None:
    host = make(world, family)
    plain, tap = host.sample(PROMPTS, [1, 2, 3]), Scale(BLOCK[family], 1.5)
    assert not torch.equal(host.sample(PROMPTS, [1, 2, 3], tap), plain)
    assert [index for index, _ in tap.seen] == [0, 1, 2, 3]
    levels = [sigma for _, sigma in tap.seen]
    assert levels[0] == 1.0 and levels == sorted(levels, reverse=True) and type(levels[0]) is float
    assert torch.equal(host.sample(PROMPTS, [1, 2, 3], Scale(BLOCK[family], 1.0)), plain)


def test_the_loss_is_that_of_the_velocity(world: Any, family: str) -> None:
    """In parts or whole; a tap counts; a model that is right has none."""
    host = make(world, family)
    latents, seeds = host.sample(PROMPTS, [1, 2, 3]), [7, 8, 9]
    whole = host.denoising_loss(PROMPTS, latents, seeds, 0.6)
    assert whole > 0
    parts = [host.denoising_loss([p], latents[i : i + 1], [seeds[i]], 0.6) for i, p in enumerate(PROMPTS)]
    assert whole == pytest.approx(sum(parts) / 3, rel=1e-4)
    assert host.denoising_loss(PROMPTS, latents, seeds, 0.6, Scale(BLOCK[family], 1.0)) == whole
    early = BLOCK[family].replace("1", "0")  # after the last one a norm undoes it
    assert host.denoising_loss(PROMPTS, latents, seeds, 0.6, Scale(early, 3.0)) != whole
    drawn = host._noise(seeds)
    for parameter in host._model.model.diffusion_model.final_layer.parameters():
        parameter.zero_()  # its velocity is 0: the loss is that of noise - latent
    expected = (drawn - latents).square().mean().item()
    assert host.denoising_loss(PROMPTS, latents, seeds, 0.6) == pytest.approx(expected, rel=1e-3)


def test_a_prompt_is_encoded_once(world: Any, family: str) -> None:
    clip = Clip()
    host = make(world, family, clip)
    host.prepare(PROMPTS)
    assert clip.encoded == [*PROMPTS, "a blur"] and host.unknown([*PROMPTS, "a cow"]) == ["a cow"]
    host.sample(PROMPTS, [1, 2, 3])
    assert len(clip.encoded) == 4
    without = Clip()
    make(world, family, without, cfg=1.0).sample(PROMPTS, [1, 2, 3])
    assert without.encoded == PROMPTS


def test_given_conditionings_take_the_place_of_the_clip(world: Any, family: str) -> None:
    expected = make(world, family).sample(PROMPTS, [1, 2, 3])
    given = [Clip().encode_from_tokens_scheduled(p) for p in PROMPTS]
    host = host_of(world, world.model(family), None)
    with pytest.raises(ValueError, match=r"3 prompts and 2 conditionings"):
        host.prepare(PROMPTS, given[:2])
    with pytest.raises(ValueError, match=r"how to encode 'a blur'"):
        host.prepare(PROMPTS, given)
    blur = Clip().encode_from_tokens_scheduled("a blur")
    host.prepare(PROMPTS, given, blur)
    assert torch.equal(host.sample(PROMPTS, [1, 2, 3]), expected)
    assert host.sampler["text_encoder"] == "given"
    with pytest.raises(ValueError, match=r"how to encode 'a cow'"):
        host.sample(["a cow"], [1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c * 2, r"of 'a cat' is made of 2"),
        (lambda c: [[c[0][0], {**c[0][1], "mask": torch.ones(1)}]], r"of 'a cat' has a mask"),
        (lambda c: [[c[0][0], {}]], r"of 'a cat' lacks a pooled output"),
    ],
)
def test_conditionings_that_say_more_are_refused(world: Any, family: str, change: Any, message: str) -> None:
    host = make(world, family)
    if "pooled" in message and not host.architecture.pooled_width:
        pytest.skip("it takes no vector")
    with pytest.raises(ValueError, match=message):
        host.prepare(["a cat"], [change(Clip().encode_from_tokens_scheduled("a cat"))])


def test_a_text_encoder_that_gives_no_vector_but_a_mask_will_do(world: Any, family: str) -> None:
    """As those of Chroma and FLUX.2; which tokens count, no family is told by the mask alone."""
    if TINIES[family].pooled_width:
        pytest.skip("it takes a vector")

    class Bare(Clip):
        def encode_from_tokens_scheduled(self, tokens: Any) -> list:
            ((sequence, _),) = super().encode_from_tokens_scheduled(tokens)
            mask = torch.ones(sequence.shape[:2])
            return [[sequence, {"pooled_output": None, "attention_mask": mask}]]

    expected = make(world, family).sample(PROMPTS, [1, 2, 3])
    assert torch.equal(make(world, family, Bare()).sample(PROMPTS, [1, 2, 3]), expected)
    given = [Bare().encode_from_tokens_scheduled(p) for p in [*PROMPTS, "a blur"]]
    host = host_of(world, world.model(family), None)
    host.prepare([*PROMPTS, "a blur"], given)
    assert torch.equal(host.sample(PROMPTS, [1, 2, 3]), expected)


def test_prompts_of_other_lengths_are_refused(world: Any, family: str) -> None:
    if TINIES[family].traits.least_tokens:
        pytest.skip("it makes them equally long")
    long = "a very long prompt with more than six words"
    with pytest.raises(ValueError, match=r"'a very long prompt.*' has 9 text tokens where others have 6"):
        make(world, family).prepare([*PROMPTS, long])


def test_prompts_of_other_guidance_are_kept_apart(world: Any, family: str) -> None:
    given = [Clip().encode_from_tokens_scheduled(p) for p in PROMPTS]
    for conditioning, guidance in zip(given, (3.5, 3.5, 4.0), strict=True):
        conditioning[0][1]["guidance"] = guidance
    host = make(world, family)
    host.prepare(PROMPTS, given)
    assert host.sampler["guidance"] == "3.5"
    host.sample(PROMPTS[:2], [1, 2])
    with pytest.raises(ValueError, match=r"'a dog' was encoded with other settings"):
        host.sample(PROMPTS, [1, 2, 3])


def test_a_sampler_that_asks_more_than_once_a_step_is_refused(world: Any, family: str) -> None:
    host = make(world, family, sampler="heun")
    with pytest.raises(ValueError, match=r"called the model 7 times in 4 steps"):
        host.sample(PROMPTS, [1, 2, 3], recorder(["text"], 3))


def test_a_position_that_is_not_reached_is_an_error(world: Any, family: str) -> None:
    model = world.model(family)

    def skip(executor: Any, *args: Any) -> Any:
        return [torch.zeros_like(args[2]) for _ in args[1]]

    model.add_wrapper_with_key("calc_cond_batch", "some_cache", skip)
    host = host_of(world, model, Clip())
    with pytest.raises(NotSteered, match=r"^SafeDIG: this run is not read as planned: step 1 .*some_cache"):
        host.sample(PROMPTS, [1, 2, 3], recorder(["text"], 3))


def test_a_model_that_is_steered_is_refused(world: Any, family: str, tmp_path: Path) -> None:
    host = make(world, family)
    plan = [Action(BLOCK[family], "repel", "residual", 1.0)]
    write_dictionary(tmp_path / "d.safetensors", plan, architecture=host.architecture)
    dictionary = pack_module("safedig_core.dictionary.dictionary").Dictionary.open(tmp_path / "d.safetensors")
    steering = pack_module("safedig_core.steering.steering").Steering(dictionary)
    steered, _ = pack_module("nodes.bridge.steered").attach(world.model(family), steering)
    host = host_of(world, steered, Clip())
    with pytest.raises(ValueError, match="This model is steered: connect it as it is before"):
        host.sample(PROMPTS, [1, 2, 3], recorder(["text"], 3))


def test_the_name_tells_models_apart(world: Any, family: str) -> None:
    model = world.model(family)
    name = make(world, family).name
    assert host_of(world, model.clone(), Clip()).name == name
    key = next(k for k, v in model.model.named_parameters() if v.dim() == 2 and "blocks" in k)
    patched, changed = model.clone(), {name}
    for amount in (0.5, 0.6):
        weight = dict(model.model.named_parameters())[key]
        patched.add_patches({key: ("diff", (amount * torch.ones_like(weight),))}, 1.0)
        host = host_of(world, patched, Clip())
        changed.add(host.name)
        host.sample(PROMPTS, [1, 2, 3])  # patches are in the weights from here on
        assert host_module.fingerprint(patched) == host.name.split()[-1]
    assert len(changed) == 3
    with torch.no_grad():
        other = world.model(family)
        dict(other.model.named_parameters())[key][:] += 1
    assert host_of(world, other, Clip()).name not in changed


def test_it_keeps_nothing_of_comfyuis_in_memory(world: Any, family: str) -> None:
    """What the cache lets go of is gone, and that is said before anything is sampled."""
    for gone in ("model", "CLIP", "conditioning"):
        model, clip = world.model(family), None if gone == "conditioning" else Clip()
        given = None if clip else [Clip().encode_from_tokens_scheduled(p) for p in [*PROMPTS, "a blur"]]
        host = host_module.ComfyHost(model, clip, SETTINGS, batch=2)
        host.prepare([*PROMPTS, "a blur"], given)
        expected = host.sample(PROMPTS, [1, 2, 3])
        host.forget()
        assert host.unknown(PROMPTS) == PROMPTS and host.alive
        assert torch.equal(host.sample(PROMPTS, [1, 2, 3]), expected)
        host.forget()
        if gone == "model":
            del model
        else:
            del clip, given
        gc.collect()
        assert not host.alive
        with pytest.raises(ValueError, match=f"no longer holds the {gone} .*with Capture Activations in it"):
            host.sample(PROMPTS, [1, 2, 3])


def test_without_a_cache_it_holds_the_model_itself(
    world: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --cache-none nothing else would hold it until a dictionary is trained."""
    monkeypatch.setattr(sys.modules["comfy.cli_args"].args, "cache_none", True)
    host = host_module.ComfyHost(world.model(family), Clip(), SETTINGS, batch=2)
    gc.collect()
    assert host.alive and host.sample(PROMPTS, [1, 2, 3]).isfinite().all()


# the tokens of prompts


def test_prompt_tokens_are_those_of_the_clip(world: Any) -> None:
    host = make(world, "flux")
    assert host.prompt_tokens(["a cat", "a"]) == [["a", "cat"], ["a"]]


def test_without_a_clip_tokens_go_by_their_place(world: Any) -> None:
    given = Clip().encode_from_tokens_scheduled(Clip().tokenize("a cat"))
    host = host_of(world, world.model("flux"), None, replace(SETTINGS, cfg=1.0))
    vars(world).setdefault("held", []).append(given)
    host.prepare(["a cat"], [given])
    assert host.prompt_tokens(["a cat", "a"]) == [["0", "1", "2", "3", "4", "5"]] * 2


def test_names_of_tokens_are_those_that_the_model_reads(world: Any) -> None:
    """FLUX.1 reads T5's tokens, SD3.5 CLIP's and then T5's, FLUX.2 zeros and then its only encoder's;
    padding has no name."""
    clip = [(49406, 1.0), (320, 1.0), (49407, 1.0), (49407, 1.0)]
    tokens = {"g": [clip], "l": [clip], "t5xxl": [[(3, 1.0), (9, 1.2), (1, 1.0), (0, 1.0)]]}
    assert host_module._names(tokens, FAMILIES["flux"]) == ["3", "9", "1", ""]
    assert host_module._names(tokens, FAMILIES["sd3"]) == ["l49406", "l320", "", "", "3", "9", "1", ""]
    assert host_module._names({"t5xxl": tokens["t5xxl"]}, FAMILIES["chroma"]) == ["3", "9", "1", ""]
    mistral = {"mistral3_24b": [[(1, 1.0), (0, 1.0), (11, 1.0)]]}  # it has no padding
    assert host_module._names(mistral, FAMILIES["flux2"]) == [""] * 509 + ["1", "0", "11"]
    klein = {"qwen3_4b": [[(5, 1.0)] + 519 * [(151643, 1.0)]]}
    assert host_module._names(klein, FAMILIES["flux2"]) == ["5"] + [""] * 519
