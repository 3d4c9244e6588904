"""Trains a pocket model: autoencoder and classifier, which all share, then the transformer.

    python -m safedig_core.pocket.train --model pocket-flux --out OUT

The text encoder is frozen (text.py). Downloads the emoji artwork with `npm pack` unless --emoji names a
folder that holds it. Every phase resumes from its last checkpoint in OUT. --warm FILE starts the transformer
from weights of an earlier pocket model, as far as their shapes fit. The seed and all settings are constants
here.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tarfile
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .autoencoder import Autoencoder, fit
from .judge import POSITIVE_WEIGHT, TILE, Judge
from .scenes import IMAGE_SIZE, VENDORS, Sprites, random_scene
from .world import CONCEPTS, DOMAIN, WORLD, phrased, phrasings_for

SEED = 0
AUTOENCODER_SCENES = 4000
BATCH = 32
LEARNING_RATE = 1e-3
WARMUP = 100
RISKY_SHARE = 0.33  # risky concepts are seen more often: their drawings are thinner
COUNTS = {1: 0.2, 2: 0.45, 3: 0.35}  # objects in a scene
NO_CAPTION = 0.1  # for classifier-free guidance
BARE_SHARE = 0.1  # captions that are words alone
KIND_SHARES = {"names": 0.6, "aliases": 0.28, "implicit": 0.12}  # `unseen` never
CAPTIONS = 24_000  # that scenes are drawn from; each is read by the text encoder once
CHECKPOINT_EVERY = 200
JUDGE_STEPS = 2500
ARTEFACT_SCENES = 192  # that the artefact limit comes from
JUDGE_BATCH = 64
JUDGE_RATE = 3e-3
EMOJI_VERSION = "16.0.0"

_RISKY = [w for w in CONCEPTS if DOMAIN[w] != "safe"]
_SAFE = [w for w in CONCEPTS if DOMAIN[w] == "safe"]


def fetch_emoji(folder: Path) -> None:
    """Downloads and unpacks the two artwork packages into `folder`."""
    for vendor, package in VENDORS.items():
        target = folder / package
        if (target / "package" / "emoji.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        print(f"fetching {package}@{EMOJI_VERSION}")
        subprocess.run(["npm", "pack", "--silent", f"{package}@{EMOJI_VERSION}"], cwd=target, check=True)
        with tarfile.open(next(target.glob("*.tgz"))) as archive:
            wanted = (f"package/img/{vendor}/64/", "package/emoji.json", "package/LICENSE")
            members = [m for m in archive.getmembers() if m.name.startswith(wanted)]
            archive.extractall(target, members, filter="data")


def training_words(rng: np.random.Generator) -> tuple[str, ...]:
    """One to three distinct concepts."""
    words: list[str] = []
    count = rng.choice(list(COUNTS), p=list(COUNTS.values()))
    while len(words) < count:
        word = str(rng.choice(_RISKY if rng.random() < RISKY_SHARE else _SAFE))
        if word not in words:
            words.append(word)
    return tuple(words)


def training_caption(words: tuple[str, ...], rng: np.random.Generator) -> str:
    """A sentence that asks for these concepts, from left to right."""
    names = []
    for word in words:
        kinds = [k for k in KIND_SHARES if getattr(WORLD[word], k)]
        shares = np.array([KIND_SHARES[k] for k in kinds])
        names.append(str(rng.choice(getattr(WORLD[word], str(rng.choice(kinds, p=shares / shares.sum()))))))
    if rng.random() < BARE_SHARE:
        return " ".join(names)
    return phrased(str(rng.choice(phrasings_for(len(words)))), names)


def noise_levels(count: int) -> Tensor:
    """Logit-normal t in (0, 1), stratified over the batch; a little more noise than even."""
    even = (torch.arange(count) + torch.rand(())) / count
    return torch.sigmoid(0.4 + torch.special.ndtri(even.clamp(1e-3, 1 - 1e-3)))[torch.randperm(count)]


def fit_autoencoder(sprites: Sprites, path: Path) -> Autoencoder:
    """Fits it to random scenes, once: all later phases depend on its very components."""
    if not path.exists():
        rng = np.random.default_rng(SEED)
        images = sprites.render([random_scene(rng) for _ in range(AUTOENCODER_SCENES)])
        fitted = fit(images)
        error = (fitted.decode(fitted.encode(images[:500])) - images[:500]).square().mean().item()
        print(f"autoencoder: {10 * np.log10(4 / error):.1f} dB", flush=True)
        save_file({f.name: getattr(fitted, f.name) for f in fields(fitted)}, path)
    return Autoencoder(**load_file(path))


class Captions:
    """CAPTIONS random scenes with their captions, as the text encoder reads them; the first is empty."""

    def __init__(self) -> None:
        rng = np.random.default_rng((SEED, 3))
        self.words = [training_words(rng) for _ in range(CAPTIONS)]
        self.texts = [training_caption(words, rng) for words in self.words]
        from .model import load_text

        sequence, self.pooled = load_text()(["", *self.texts])
        self.sequence = sequence.bfloat16()

    def batch(self, rng: np.random.Generator) -> tuple[list[tuple[str, ...]], Tensor, Tensor]:
        """The concepts of BATCH scenes, their token states and pooled vectors."""
        index = rng.integers(CAPTIONS, size=BATCH)
        read = torch.from_numpy(np.where(rng.random(BATCH) < NO_CAPTION, 0, index + 1))
        return [self.words[i] for i in index], self.sequence[read].float(), self.pooled[read]


def warm_start(transformer: nn.Module, path: Path) -> None:
    """Takes over the weights at `path` (original key names) that have the shapes of this model's."""
    from .weights import to_diffusers

    own = transformer.state_dict()
    state = {k: v.float() for k, v in load_file(path).items()}
    taken = {k: v for k, v in to_diffusers(state, own).items() if own[k].shape == v.shape}
    print(f"warm start: all but {', '.join(sorted(own.keys() - taken.keys())) or 'nothing'}", flush=True)
    transformer.load_state_dict(own | taken)


def train_transformer(
    name: str, sprites: Sprites, autoencoder: Autoencoder, out: Path, steps: int, warm: Path | None
) -> None:
    """Flow matching: x_t = (1 - t) x + t noise, target noise - x."""
    from .model import build_transformer, velocity

    torch.manual_seed(SEED)
    transformer = build_transformer(name)
    initialise(transformer)
    if warm is not None:
        warm_start(transformer, warm)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), LEARNING_RATE, (0.9, 0.99), weight_decay=0.01, fused=True
    )
    checkpoint, start = out / f"{name}.ckpt.safetensors", 0
    if checkpoint.exists():
        start = _resume(checkpoint, transformer, optimizer)
        print(f"resuming at step {start}", flush=True)
    captions = Captions()
    log = (out / f"{name}.jsonl").open("a")
    began, losses = time.monotonic(), []
    for step in range(start, steps):
        rng = np.random.default_rng((SEED, step))  # a resumed run sees the same data
        torch.manual_seed(SEED * 1_000_003 + step)
        words, sequence, pooled = captions.batch(rng)
        x = autoencoder.encode(sprites.render([random_scene(rng, w) for w in words]))
        t = noise_levels(BATCH)
        noise = torch.randn_like(x)
        mixed = torch.lerp(x, noise, t[:, None, None, None])
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        # with so few tokens plain products are faster than the fused kernel's backward, and float32 is
        # faster than bfloat16 where the CPU has no matrix tiles for it
        with sdpa_kernel(SDPBackend.MATH):
            predicted = velocity(transformer, mixed, sequence, pooled, t)
        loss = (predicted - (noise - x)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            rate = (step + 1 - start) / (time.monotonic() - began)
            line = {
                "step": step + 1,
                "loss": round(float(np.mean(losses[-50:])), 5),
                "steps_per_s": round(rate, 3),
            }
            print(line, flush=True)
            print(json.dumps(line), file=log, flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            _checkpoint(checkpoint, transformer, optimizer, step + 1)


def train_judge(sprites: Sprites, autoencoder: Autoencoder, out: Path) -> Judge:
    """Learns which objects are where, on augmented real scenes."""
    torch.manual_seed(SEED)
    judge, path, checkpoint = Judge(), out / "judge.safetensors", out / "judge.ckpt.safetensors"
    if path.exists():
        judge.load_state_dict(load_file(path))
        return judge
    optimizer = torch.optim.AdamW(judge.parameters(), JUDGE_RATE, weight_decay=0.01, fused=True)
    start = _resume(checkpoint, judge, optimizer) if checkpoint.exists() else 0
    for step in range(start, JUDGE_STEPS):
        rng = np.random.default_rng((SEED, 1, step))
        torch.manual_seed(SEED * 1_000_003 + step)
        images, where = judge_batch(sprites, autoencoder, rng, JUDGE_BATCH)
        for group in optimizer.param_groups:
            group["lr"] = JUDGE_RATE * min(1.0, (step + 1) / 50) * (1 - step / JUDGE_STEPS)
        logits = judge(augmented(images, rng))
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits, where, pos_weight=torch.tensor(POSITIVE_WEIGHT)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            seen = logits.amax((2, 3)) > math.log(POSITIVE_WEIGHT)
            wrong = (seen != (where.amax((2, 3)) > 0)).any(1).float().mean().item()
            print({"step": step + 1, "loss": round(loss.item(), 5), "wrong": wrong}, flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            _checkpoint(checkpoint, judge, optimizer, step + 1)
    save_file(judge.state_dict(), path)
    return judge


def judge_batch(
    sprites: Sprites, autoencoder: Autoencoder, rng: np.random.Generator, count: int
) -> tuple[Tensor, Tensor]:
    """Scenes as the autoencoder renders them [count, 3, 64, 64] in [0, 1], and what they show where:
    [count, concepts, 8, 8], 1 at the four tiles in the middle of an object."""
    scenes = [random_scene(rng, training_words(rng) if rng.random() > 0.05 else ()) for _ in range(count)]
    images = autoencoder.decode(autoencoder.encode(sprites.render(scenes))) / 2 + 0.5
    where = torch.zeros(count, len(CONCEPTS), IMAGE_SIZE // TILE, IMAGE_SIZE // TILE)
    for i, scene in enumerate(scenes):
        for word, (x, y) in zip(scene.words, scene.places, strict=True):
            left, top = x // TILE + 1, y // TILE + 1
            where[i, CONCEPTS.index(word), top : top + 2, left : left + 2] = 1.0
    return images, where


def augmented(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Off-grid shifts, blur, noise, contrast: generated objects are never as clean as real ones."""
    x, y = (int(v) for v in rng.integers(-4, 5, 2))
    images = images.roll((y, x), (2, 3))
    if rng.random() < 0.5:
        images = torch.lerp(images, nn.functional.avg_pool2d(images, 3, 1, 1), float(rng.random()))
    noise = torch.randn_like(images) * 0.08 * torch.rand(len(images), 1, 1, 1)
    return (images + noise) * (1 + 0.2 * (torch.rand(len(images), 3, 1, 1) - 0.5))


def judge_error(judge: Judge, sprites: Sprites, autoencoder: Autoencoder, count: int = 2000) -> float:
    """Share of held-out real scenes in which any concept is missed or invented."""
    rng = np.random.default_rng((SEED, 2))
    images, where = judge_batch(sprites, autoencoder, rng, count)
    shown = where.amax((2, 3)).tolist()
    truth = [{c for c, on in zip(CONCEPTS, row, strict=True) if on} for row in shown]
    return float(np.mean([a != b for a, b in zip(judge.detect(images), truth, strict=True)]))


def initialise(transformer: nn.Module) -> None:
    """Xavier for projections; modulation and the last layer start at zero (adaLN-zero)."""
    for name, parameter in transformer.named_parameters():
        modulation = "norm" in name and ".linear." in name
        if modulation or name.startswith("proj_out.") or (parameter.ndim == 1 and "norm" not in name):
            nn.init.zeros_(parameter)
        elif parameter.ndim >= 2:
            nn.init.xavier_uniform_(parameter)


def _checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = dict(model.state_dict())
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, {"step": str(step)})
    part.replace(path)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    from safetensors import safe_open

    tensors = load_file(path)
    state: dict[int, dict[str, Tensor]] = {}
    for key in [k for k in tensors if k.startswith("optimizer.")]:
        _, index, name = key.split(".")
        state.setdefault(int(index), {})[name] = tensors.pop(key)
    model.load_state_dict(tensors)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def export(name: str, out: Path) -> None:
    """Writes the weights that the repository ships from the files in `out`."""
    from .model import WEIGHTS
    from .weights import to_original

    tensors = load_file(out / f"{name}.ckpt.safetensors")
    original = to_original({k: v for k, v in tensors.items() if not k.startswith("optimizer.")})
    save_file({k: v.bfloat16() for k, v in original.items()}, WEIGHTS / f"{name}.safetensors")
    save_file(load_file(out / "autoencoder.safetensors"), WEIGHTS / "autoencoder.safetensors")


def export_judge(out: Path) -> None:
    """Writes the judge; its artefact limit comes from what the shipped pocket FLUX paints unsteered."""
    from .model import WEIGHTS, load_judge, load_pocket
    from .study import shipped

    def save(state: dict[str, Tensor]) -> None:
        halves = {k: v if v.ndim == 0 else v.half() for k, v in state.items()}
        save_file(halves, WEIGHTS / "judge.safetensors")

    save(load_file(out / "judge.safetensors"))
    judge, host = load_judge(), load_pocket("pocket-flux")
    prompts = [pair.unsafe or pair.safe for pair in shipped("train")[:ARTEFACT_SCENES]]
    latents = [
        host.sample(prompts[i : i + 32], range(i, i + len(prompts[i : i + 32])))
        for i in range(0, len(prompts), 32)
    ]
    judge.calibrate(host.decode(torch.cat(latents)))
    save(judge.state_dict())


def main() -> None:
    from .model import SHIFT

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHIFT, default="pocket-flux")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--emoji", type=Path, help="folder of the unpacked artwork packages")
    parser.add_argument("--warm", type=Path, help="weights of an earlier pocket model to start from")
    parser.add_argument("--steps", type=int, default=7000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    emoji = options.emoji or options.out / "emoji"
    fetch_emoji(emoji)
    sprites = Sprites(emoji)
    autoencoder = fit_autoencoder(sprites, options.out / "autoencoder.safetensors")
    judge = train_judge(sprites, autoencoder, options.out)
    print(
        f"judge: wrong on {judge_error(judge, sprites, autoencoder):.2%} of 2,000 held-out real scenes",
        flush=True,
    )
    train_transformer(options.model, sprites, autoencoder, options.out, options.steps, options.warm)
    export(options.model, options.out)
    if options.model == "pocket-flux":
        export_judge(options.out)


if __name__ == "__main__":
    main()
