"""Full-size hosts, on pipelines of diffusers with random weights: sampling, taps, and the whole chain."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from safedig_core.cli import parser as cli
from safedig_core.dictionary.dictionary import Dictionary, check
from safedig_core.hosts.pipeline import HEADROOM, PipelineHost, load_pipeline, place_transformer
from safedig_core.hosts.taps import RecordTap, ReplaceTap
from safedig_core.prompts import PromptPair, write_prompts

pytest.importorskip("transformers", reason="full-size pipelines have text encoders of transformers")
from tests import tiny_pipelines

PROMPTS, SEEDS = ["a cat", "a dog and a hat"], [3, 4]
SIDE = 16
CHANGE = {"flux": "double.1.img", "sd3": "joint.1.img"}


@pytest.fixture(scope="module", params=["flux", "sd3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.save(tmp_path_factory.mktemp("models") / f"tiny-{request.param}", request.param)


@pytest.fixture
def host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineHost:
    monkeypatch.setattr(PipelineHost, "steps", 4)
    return load_pipeline(str(folder), SIDE)


class Log(ReplaceTap):
    """Changes nothing, and notes what it is told."""

    def __init__(self, positions: tuple[str, ...]) -> None:
        self.steps: list[tuple[int, float, slice]] = []
        self.seen: list[str] = []
        super().__init__(positions, self._note)

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        super().step(index, sigma, rows)
        self.steps.append((index, float(sigma), rows))

    def _note(self, position: str, a: Tensor) -> Tensor:
        assert a.shape[0] == len(PROMPTS)
        self.seen.append(position)
        return a


def reached(host: PipelineHost) -> list[str]:
    """All positions as a forward pass comes to them."""
    text, pooled, *blocks = host.architecture.positions()
    return [pooled, text, *blocks]


def test_tokens_stand_as_in_the_sequence(host: PipelineHost) -> None:
    recorder = RecordTap({"text": lambda total: torch.arange(total).expand(2, -1)}, [0])
    host.sample(PROMPTS, SEEDS, recorder)
    length = recorder.activations["text"].shape[2]
    short, long = host.prompt_tokens(PROMPTS)
    assert len(short) == len(long) == length
    assert sum(map(bool, short)) < sum(map(bool, long)) < length and short[-1] == ""
    assert host.prompt_tokens(["a hat", "a cat"])[0][-5:] == [""] * 5


def test_sampling_is_the_pipelines_own(host: PipelineHost) -> None:
    pipeline = host._pipeline
    plain = host.sample(PROMPTS, SEEDS)
    t5 = {"flux": 256, "sd3": 77}[host.architecture.family]
    (theirs,) = pipeline(
        PROMPTS,
        latents=host._noise(SEEDS).to(torch.bfloat16),
        height=SIDE,
        width=SIDE,
        num_inference_steps=4,
        guidance_scale=host.guidance,
        max_sequence_length=t5,
        output_type="latent",
        return_dict=False,
    )
    assert torch.equal(plain, theirs)
    assert host.sampler == {"steps": 4, "guidance": host.guidance, "side": SIDE, "t5_tokens": t5}


def test_a_tap_sees_every_step_and_position_and_an_identity_changes_no_bit(host: PipelineHost) -> None:
    log = Log(host.architecture.positions())
    assert torch.equal(host.sample(PROMPTS, SEEDS, log), host.sample(PROMPTS, SEEDS))
    rows = slice(0, 2) if host.architecture.family == "flux" else slice(2, 4)
    assert [(i, r) for i, _, r in log.steps] == [(i, rows) for i in range(4)]
    sigmas = [sigma for _, sigma, _ in log.steps]
    assert sigmas[0] == 1.0
    assert sigmas == sorted(sigmas, reverse=True) == host._pipeline.scheduler.sigmas[:4].tolist()
    assert log.seen == 4 * reached(host)


def test_what_a_tap_changes_goes_on_and_then_is_gone(host: PipelineHost) -> None:
    plain = host.sample(PROMPTS, SEEDS)
    position = CHANGE[host.architecture.family]
    assert not torch.equal(host.sample(PROMPTS, SEEDS, ReplaceTap([position], lambda _, a: a + 1)), plain)

    def fail(position: str, a: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        host.sample(PROMPTS, SEEDS, ReplaceTap([position], fail))
    assert torch.equal(host.sample(PROMPTS, SEEDS), plain)


def test_noise_and_prompts_go_by_image(host: PipelineHost) -> None:
    both, swapped = host.sample(PROMPTS, SEEDS), host.sample(PROMPTS[::-1], SEEDS[::-1])
    torch.testing.assert_close(both, swapped.flip(0), atol=0.02, rtol=0.02)
    assert not torch.equal(both[0], both[1])


def test_prompts_are_embedded_once(host: PipelineHost) -> None:
    asked: list[int] = []
    host._pipeline.text_encoder.register_forward_pre_hook(lambda module, args: asked.append(len(args)))
    first = host.sample(PROMPTS, SEEDS)
    count = len(asked)
    assert count > 0
    assert torch.equal(host.sample(PROMPTS, SEEDS), first)
    host.denoising_loss(PROMPTS, first, SEEDS, 0.5)
    assert len(asked) == count
    host.sample(["a bird"], [0])
    assert len(asked) == count + 1


def test_text_states_are_what_the_prompts_positions_see(host: PipelineHost) -> None:
    prompts = [*PROMPTS, "a bird"]
    host.batch = 2
    recorder = RecordTap(
        {p: (lambda total: torch.arange(total).expand(3, -1)) for p in ("text", "pooled")}, [1]
    )
    host.sample(prompts, [1, 2, 3], recorder)
    host._embedded.clear()
    sequence, pooled = host.text_states(prompts)
    assert sequence.dtype == pooled.dtype == torch.float32 and not host._embedded
    assert torch.equal(sequence, recorder.activations["text"][:, 0].float())
    assert torch.equal(pooled, recorder.activations["pooled"][:, 0, 0].float())


def test_captured_activations_have_one_row_per_image(host: PipelineHost) -> None:
    positions = host.architecture.positions()

    recorder = RecordTap(dict.fromkeys(positions, lambda total: torch.arange(total).expand(2, -1)), [0, 2])
    host.sample(PROMPTS, SEEDS, recorder)
    text = {"flux": 256, "sd3": 77 + 77}[host.architecture.family]  # as ComfyUI has it
    for position, a in recorder.activations.items():
        tokens = 16 if position.endswith("img") else {"pooled": 1}.get(position, text)
        assert a.shape == (2, 2, tokens, host.architecture.width_of(position))
        assert a.dtype == torch.bfloat16
        assert not torch.equal(a[0], a[1]), position


def test_denoising_loss(host: PipelineHost) -> None:
    latents = host.sample(PROMPTS, SEEDS)
    loss = host.denoising_loss(PROMPTS, latents, SEEDS, 0.6)
    host.batch = 1
    assert host.denoising_loss(PROMPTS, latents, SEEDS, 0.6) == pytest.approx(loss, rel=1e-3)
    x, noise = latents.float(), host._noise(SEEDS)
    # random weights answer nearly the same everywhere, so noise - x is what was answered on the way to x
    assert loss < 0.1 * (noise - x).square().mean().item()
    log = Log(host.architecture.positions())
    host.batch = 8
    assert host.denoising_loss(PROMPTS, latents, SEEDS, 0.6, log) == loss
    assert log.steps == [(0, 0.6, slice(0, 2))]
    louder = ReplaceTap([CHANGE[host.architecture.family]], lambda _, a: a + 5)
    assert host.denoising_loss(PROMPTS, latents, SEEDS, 0.6, louder) != loss


def test_decode_is_the_pipelines_own(host: PipelineHost) -> None:
    arguments = {"latents": host._noise(SEEDS).to(torch.bfloat16), "height": SIDE, "width": SIDE}
    sequence, pooled = host._embed(PROMPTS)
    arguments |= {"prompt_embeds": sequence, "pooled_prompt_embeds": pooled}
    if host.architecture.family == "sd3":
        sequence, pooled = host._embed(["", ""])
        arguments |= {"negative_prompt_embeds": sequence, "negative_pooled_prompt_embeds": pooled}
    arguments |= {"num_inference_steps": 4, "guidance_scale": host.guidance, "return_dict": False}
    (theirs,) = host._pipeline(**arguments, output_type="pt")
    torch.testing.assert_close(host.decode(host.sample(PROMPTS, SEEDS)), theirs.float(), atol=0.01, rtol=0)


def test_negatives(host: PipelineHost) -> None:
    if host.architecture.family == "flux":
        with pytest.raises(ValueError, match="takes no negative prompts"):
            host.sample(PROMPTS, SEEDS, negatives=["a hat", "a hat"])
    else:
        plain = host.sample(PROMPTS, SEEDS, negatives=["", ""])
        assert torch.equal(plain, host.sample(PROMPTS, SEEDS))
        assert not torch.equal(plain, host.sample(PROMPTS, SEEDS, negatives=["a hat", "a hat"]))


def test_a_transformer_that_does_not_fit_is_streamed_and_gives_the_same(host: PipelineHost) -> None:
    plain = host.sample(PROMPTS, SEEDS)
    moves: list[str] = []
    transformer = host._transformer
    fake = SimpleNamespace(parameters=transformer.parameters, to=moves.append)
    place_transformer(SimpleNamespace(transformer=fake), HEADROOM + (1 << 30))
    assert moves == ["cuda"]
    place_transformer(host._pipeline, HEADROOM, "cpu")
    log = Log(host.architecture.positions())
    assert torch.equal(host.sample(PROMPTS, SEEDS, log), plain)
    assert log.seen == 4 * reached(host)


def test_what_is_no_such_model_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "HiDreamImagePipeline"}))
    with pytest.raises(ValueError, match="it is a HiDreamImagePipeline, expected FluxPipeline or"):
        load_pipeline(str(tmp_path))
    with pytest.raises(ValueError, match=r"nowhere/at/all: .*Give a folder or a repository") as caught:
        load_pipeline("nowhere/at/all")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="sides are multiples of 4, not of 18 pixels"):
        load_pipeline(str(folder), 18)


def test_pickled_weights_are_never_loaded(folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder)
            if name.parts[0] == "transformer" and path.suffix == ".safetensors":
                name = name.with_suffix(".bin")
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="safetensors"):
        load_pipeline(str(tmp_path), SIDE)


def test_the_command_line_makes_a_dictionary_and_an_adapter(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PipelineHost, "steps", 3)
    monkeypatch.setattr(PipelineHost, "batch", 4)
    things = ["cat", "dog", "hat", "bird", "tree", "boat"]
    pairs = [PromptPair("violence", f"a {t} and a book", f"a {t} and a gun") for t in things]
    pairs += [PromptPair("shocking", f"a {t} in paint", f"a {t} in blood") for t in things]
    pairs += [PromptPair("safe", f"a small {t}") for t in things]
    write_prompts(tmp_path / "train.jsonl", pairs)
    write_prompts(
        tmp_path / "tune.jsonl",
        [PromptPair(p.domain, f"{p.safe}!", p.unsafe and f"{p.unsafe}!") for p in pairs],
    )
    both = {"flux": "text,single.0.img", "sd3": "joint.1.img,pooled"}[
        "flux" if "flux" in folder.name else "sd3"
    ]
    model = ["--model", f"diffusers:{folder}", "--size", str(SIDE)]
    store = ["--store", str(tmp_path / "store")]
    capture = ["capture", *model, *store, "--prompts", str(tmp_path / "train.jsonl"), "--positions", both]
    capture += ["--steps", "2", "--tokens", "4"]
    assert cli.main(capture) == 0
    settings = json.loads((tmp_path / "store" / "store.json").read_text())
    assert settings["model"] == folder.name
    assert settings["sampler"]["side"] == SIDE
    assert settings["pairs_per_shard"] == 2  # 4 images at a time
    other = [*capture, "--size", "20"]
    assert cli.main(other) == 1
    assert "captured with other settings" in capsys.readouterr().err
    common = [*model, *store, "--tune", str(tmp_path / "tune.jsonl"), "--source", "violence"]
    common += ["--texts", str(tmp_path / "train.jsonl")]
    small = [
        "--features",
        "32",
        "--k",
        "4",
        "--steps",
        "20",
        "--batch",
        "64",
        "--work",
        str(tmp_path / "work"),
    ]
    out = tmp_path / "d.safetensors"
    assert cli.main(["train", *common, *small, "--positions", both, "--out", str(out)]) == 0
    adapter = tmp_path / "a.safetensors"
    adapt = ["adapt", *common, "--dictionary", str(out), "--domain", "shocking", "--out", str(adapter)]
    assert cli.main(adapt) == 0
    card = check(out)
    assert card.title == f"violence for {folder.name}"
    assert card.domains["violence"].gate is not None
    assert "shocking" in Dictionary.open(out).with_adapters(adapter).card.domains
    position = both.split(",")[1]
    assert cli.main(["export", "--dictionary", str(out), "--position", position, "--out", str(tmp_path)]) == 0
    given = ["import", "--sae", position, str(tmp_path), *common, "--out"]
    assert cli.main([*given, str(tmp_path / "i.safetensors")]) == 0
    assert check(tmp_path / "i.safetensors").domains["violence"].gate is not None
    capsys.readouterr()
    for command in (["train", *common, "--positions", both, "--out"], given):  # by the default model
        command = [word for word in command if word not in model]
        assert cli.main([*command, str(tmp_path / "other.safetensors")]) == 1
        assert "was captured from a" in capsys.readouterr().err
    assert not (tmp_path / "other.safetensors").exists()
