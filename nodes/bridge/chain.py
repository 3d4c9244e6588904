"""The offline chain inside ComfyUI: what the nodes do, between their widgets and safedig_core.

One run's files are in `output/safedig/<name>`:

    activations/                          the store
    checkpoints/<settings>/               of training, by position
    dictionaries/<settings>.safetensors   finished dictionaries and adapters

Whatever is finished there is taken up when the same settings are queued again.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...safedig_core import __version__
from ...safedig_core.chain import Chain, tune_again
from ...safedig_core.dictionary.dictionary import Action, Dictionary, check, read_card, save_with_card
from ...safedig_core.distributed import Group
from ...safedig_core.files import clear_parts, digest, replacing, sha256_of
from ...safedig_core.pocket.text import WIDTH as POCKET_WIDTH
from ...safedig_core.prompts import SAFE, PromptPair, fingerprint, read_prompts
from ...safedig_core.recipe import Credits, Recipe
from ...safedig_core.routing import Route, Scores, route
from ...safedig_core.store.capture import capture
from ...safedig_core.store.settings import StoreSettings
from ...safedig_core.store.store import ActivationStore, ActivationWriter
from .host import ComfyHost, Conditioning, SamplerSettings
from .workspace import (
    Need,
    Progress,
    free_disk,
    free_memory,
    plain_name,
    require_room,
    subfolder,
    training_device,
)

FEWER = "Choose fewer positions, steps or tokens per image."
CORE = Path(__file__).parents[2] / "safedig_core"
FULL_SIZE_TEXTS = (CORE / "prompt_pairs" / "safe.jsonl",)
POCKET_TEXTS = tuple(CORE / "pocket" / "prompts" / f"{name}.jsonl" for name in ("usual", "vocabulary"))

_hosts: dict[Path, ComfyHost] = {}  # of this session's captures, by folder
_lost: Counter[Path] = Counter()  # how often one of them could no longer be used


@dataclass(frozen=True)
class Captured:
    """A finished capture, and the host that it was made with."""

    folder: Path
    host: ComfyHost

    @property
    def store(self) -> ActivationStore:
        return ActivationStore(subfolder(self.folder, "activations"))

    @property
    def usual(self) -> list[PromptPair]:
        """The pack's prompts that only the text encoder reads: safe ones, and of pocket models also pairs of
        the captured domains. None where prompts came encoded: there is no CLIP to read them."""
        store = self.store
        if store.settings.sampler.get("text_encoder") == "given":
            return []
        pocket = store.architecture.text_width == POCKET_WIDTH
        captured = {SAFE, *(pair.domain for pair in store.prompts)}
        read = [pair for path in (POCKET_TEXTS if pocket else FULL_SIZE_TEXTS) for pair in read_prompts(path)]
        return [pair for pair in read if pair.domain in captured]


def texts_of(pairs: Sequence[PromptPair]) -> list[str]:
    """Every prompt of these pairs, in their order: the unsafe one, then the safe one."""
    return [text for pair in pairs for text in pair.texts]


def names_in(text: str) -> list[str]:
    """Names separated by commas, spaces or lines, each once."""
    return list(dict.fromkeys(text.replace(",", " ").split()))


def capture_into(
    folder: Path, host: ComfyHost, settings: StoreSettings, progress: Progress
) -> tuple[Captured, str]:
    """Captures what is missing in `folder`; also returns the estimate of what that takes.

    Raises ValueError (StoreError) where the folder has activations of other settings, where a
    prompt can't be encoded, and where disk or memory are too small.
    """
    store = subfolder(folder, "activations")
    writer = ActivationWriter.open(store, settings, host.tokens())
    missing = [writer.groups()[group] for group in writer.missing()]
    texts = texts_of([settings.prompts[pair] for group in missing for pair in group])
    estimate = require_room(_capture_needs(host, settings, missing, texts, store), progress)
    try:
        host.prepare(texts, progress=lambda done, total: progress("encoding prompts", done, total))
        capture(host, writer, lambda done, total: progress("capturing, shard", done, total))
    finally:
        host.forget()
    _hosts[folder] = host
    return Captured(folder, host), estimate


def losses(folder: Path) -> int:
    """Grows when what a capture of this session has left in `folder`, or was made with, has gone since."""
    host = _hosts.get(folder)
    if host is not None and not (host.alive and (folder / "activations" / "store.json").exists()):
        del _hosts[folder]
        _lost[folder] += 1
    return _lost[folder]


def _capture_needs(
    host: ComfyHost, settings: StoreSettings, missing: list[list[int]], texts: list[str], store: Path
) -> list[Need]:
    tokens, latent = host.tokens(), torch.Size(host.latent_shape)
    left = [pair for group in missing for pair in group]
    sides = max((settings.sides(group[0]) * len(group) for group in missing), default=0)
    shard = max((settings.estimated_bytes(tokens, latent.numel(), group) for group in missing), default=0)
    text = 4 * (tokens["text"] * host.architecture.text_width) * len(host.unknown(texts))
    device, total = host.memory(sides)
    less = "Choose fewer pairs per shard, or smaller pictures."
    return [
        Need("disk", settings.estimated_bytes(tokens, latent.numel(), left), free_disk(store), FEWER),
        Need("main memory", 3 * shard + text, free_memory(), f"Choose fewer pairs per shard. {FEWER}"),
        Need("memory of the model's device", device, total, less),
    ]


def routes_of(
    captured: Captured,
    source: str,
    target: str,
    pairs: Sequence[PromptPair],
    given: Sequence[Conditioning] | None,
    most: int,
    progress: Progress,
) -> list[Route]:
    """Routes of all captured positions, from `most` of `pairs` of each domain; `given` as in Making."""
    host = captured.host
    wanted = pairs if given is not None else [pair for pair in pairs if pair.domain in (source, target)]
    try:
        prepare(host, wanted, given, progress)
        return route(
            host, captured.store, source, target, pairs, most_pairs=most,
            progress=lambda done, total: progress("routing, position", done, total),
        )  # fmt: skip
    finally:
        host.forget()


def prepare(
    host: ComfyHost, pairs: Sequence[PromptPair], given: Sequence[Conditioning] | None, progress: Progress
) -> None:
    """Encodes prompts before anything is sampled, or takes them as `given`."""
    with torch.inference_mode():
        host.prepare(
            texts_of(pairs), given, progress=lambda done, total: progress("encoding prompts", done, total)
        )


@dataclass(frozen=True)
class Making:
    """What Train Dictionary and Adapt Decoder have in common; `given` are the encoded calibration prompts,
    where the capture has no CLIP.

    Both raise ValueError where something is missing or too small, before the work starts, and take up
    where a run was ended.
    """

    captured: Captured
    calibration: Sequence[PromptPair]
    given: Sequence[Conditioning] | None
    recipe: Recipe
    credits: Credits
    progress: Progress

    def train(self, source: str, actions: Sequence[Action]) -> tuple[Dictionary, str]:
        """A dictionary for `source` at the positions of `actions`; and the estimate of what it takes."""
        positions: dict[str, Scores] = {}
        for action in actions:
            positions.setdefault(action.position, {})[action.operator] = action.score
        chain, folder = self._chain(source), self.captured.folder
        path = self._path(chain, source, list(positions))
        chain.require(path, source, positions)
        needs, remedy = chain.needs(positions), "Choose fewer positions or features."
        left = 0 if path.exists() else 1
        estimate = require_room(
            [
                Need("disk", left * needs.disk, free_disk(folder), remedy),
                Need("main memory", left * needs.memory, free_memory(), remedy),
            ],
            self.progress,
        )
        if left:
            device = training_device(self.captured.host.device, needs.device)
            chain = replace(chain, processes=Group(device=device))
        with self._work():
            chain.train(path, source, positions, subfolder(folder, "checkpoints"))
        return Dictionary.open(path), estimate

    def adapt(self, dictionary: Dictionary, domain: str, source: str) -> Dictionary:
        """`dictionary` with an adapter for `domain`."""
        chain = self._chain(domain)
        path = self._path(chain, domain, dictionary.sha256, source)
        with self._work():
            chain.adapt(path, dictionary, domain, source)
        return dictionary.with_adapters(path)

    def _chain(self, domain: str) -> Chain:
        host = self.captured.host
        title = self.credits.title or f"{domain} for {host.architecture.family}"

        def prepared() -> ComfyHost:
            prepare(host, self.calibration, self.given, self.progress)
            return host

        captured, credits = self.captured, replace(self.credits, title=title)
        return Chain(
            prepared, captured.store, self.calibration, self.recipe, credits, self.progress,
            texts=captured.usual,
        )  # fmt: skip

    def _path(self, chain: Chain, domain: str, *what: object) -> Path:
        """Of the finished file: its name stands for its settings."""
        name = f"{domain}-{chain.identity(domain, *what)[:16]}.safetensors"
        return subfolder(self.captured.folder, "dictionaries") / name

    @contextmanager
    def _work(self) -> Iterator[None]:
        """Nodes run in inference mode, where nothing can be trained."""
        try:
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            self.captured.host.forget()


def host_of(
    given: dict[str, Any],
    batch: int,
    pairs: Sequence[PromptPair],
    conditioning: Sequence[Conditioning] | None,
    negative: Sequence[Conditioning] | None,
) -> ComfyHost:
    """What a node's own widgets say how to sample `pairs` with. Encoded prompts, one per text of all of them,
    take the place of the CLIP. Raises ValueError where there is neither."""
    names = ("steps", "cfg", "sampler", "scheduler", "width", "height", "negative_prompt")
    clip = given.get("clip") if conditioning is None else None
    host = ComfyHost(given["model"], clip, SamplerSettings(*(given[name] for name in names)), batch=batch)
    texts = texts_of(pairs)
    host.prepare(
        texts if conditioning is not None else texts[:1],
        conditioning,
        None if negative is None else negative[0],
    )
    return host


def sampled_host(
    given: dict[str, Any],
    pairs: Sequence[PromptPair],
    conditioning: Sequence[Conditioning] | None,
    negative: Sequence[Conditioning] | None,
    progress: Progress,
) -> ComfyHost:
    """The same, of a node with a widget for the batch. Raises ValueError where that can't fit."""
    host = host_of(given, given["batch"], pairs, conditioning, negative)
    device, total = host.memory(given["batch"])
    less = "Choose a smaller batch, or smaller pictures."
    require_room([Need("memory of the model's device", device, total, less)], progress)
    return host


def retune(
    folder: Path,
    host: ComfyHost,
    dictionary: Dictionary,
    domain: str,
    pairs: Sequence[PromptPair],
    recipe: Recipe,
    progress: Progress,
) -> tuple[Dictionary, str]:
    """`dictionary` with the strengths for one domain tuned on `pairs`, and what was tried. What is finished
    already is taken up. Adapters of a dictionary that changes are written anew, for the new file.

    Raises ValueError for an unknown domain, and where nothing helps.
    """
    dictionary.check_fits(host.architecture)
    if domain not in dictionary.card.domains:
        there = ", ".join(dictionary.card.domains)
        raise ValueError(f"{dictionary.path.name} has no domain '{domain[:60]}', only {there}.")
    files = {"": dictionary.path, **dictionary.adapter_paths}
    changed = domain if domain in dictionary.adapter_paths else ""
    what = [dictionary.sha256, dictionary.adapter_sha256, domain, fingerprint(pairs), asdict(recipe)]
    stamp = digest(*what, host.name, host.sampler, __version__)[:16]
    made = subfolder(folder, "dictionaries") / f"{domain}-tuned-{stamp}.safetensors"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        card, _ = tune_again(host, dictionary, domain, pairs, recipe, progress)
        save_with_card(made, card, files[changed])
    files[changed] = made
    base = Dictionary.open(files.pop(""))
    if not changed:
        for name, path in files.items():
            files[name] = made.with_name(f"{name}-of-{made.name}")
            save_with_card(files[name], replace(read_card(path), base_sha256=base.sha256), path)
    training = read_card(made).training
    lines = [f"removes {training['removal']:.2f}, recovers {training['recovery']:.2f}"]
    lines += [f"{reached:.3f}  {what}" for what, reached in training["tried"]]
    return base.with_adapters(*files.values()), "\n".join(lines)


def save(folder: Path, name: str, dictionary: Dictionary, overwrite: bool) -> list[Path]:
    """Copies a dictionary, as `<name>.safetensors`, and each adapter that was added to it, as
    `<name>-<domain>.safetensors`, into `folder`. A file that is there byte for byte stays.

    Raises ValueError, before anything is written, where another file of that name is there.
    """
    plain_name(name, "a file")
    files = {folder / f"{name}.safetensors": dictionary.path}
    files |= {folder / f"{name}-{d}.safetensors": path for d, path in dictionary.adapter_paths.items()}
    changed = {to: path for to, path in files.items() if not (to.exists() and _same(to, path))}
    for to, path in changed.items():
        check(path)
        if to.is_symlink() or (to.exists() and not overwrite):
            raise ValueError(
                f"{to.name} is already there, with other content: choose another name, or set 'overwrite'."
            )
    folder.mkdir(parents=True, exist_ok=True)
    for to, path in changed.items():
        clear_parts(folder, to.name)
        with replacing(to) as part:
            shutil.copyfile(path, part)
    return list(files)


def _same(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and sha256_of(one) == sha256_of(other)


def domain_of(store: ActivationStore, asked: str) -> str:
    """The domain that was asked for, or the first one captured. Raises ValueError."""
    domains = [pair.domain for pair in store.prompts if pair.domain != SAFE]
    name = asked.strip() or next(iter(domains), "")
    if name not in domains:
        raise ValueError(f"'{name[:60]}' was not captured, only {', '.join(dict.fromkeys(domains))}.")
    return name
