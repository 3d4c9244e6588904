"""The offline chain inside ComfyUI: what the nodes do, between their widgets and safedig_core.

One run's files are in `output/safedig/<name>`:

    activations/                          the store
    checkpoints/<settings>/               of training, by position
    dictionaries/<settings>.safetensors   finished dictionaries and adapters

Whatever is finished there is taken up when the same settings are queued again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ...safedig_core import __version__
from ...safedig_core.chain import build_adapter, build_dictionary, require_prompts
from ...safedig_core.dictionary.dictionary import Dictionary, check
from ...safedig_core.features import SELECT_EVERY
from ...safedig_core.files import clear_parts, replacing, sha256_of
from ...safedig_core.prompts import SAFE, PromptPair, fingerprint
from ...safedig_core.recipe import Credits, Recipe
from ...safedig_core.store.capture import capture, captured_steps
from ...safedig_core.store.settings import StoreSettings
from ...safedig_core.store.store import ActivationStore, ActivationWriter
from .host import ComfyHost, Conditioning
from .workspace import Need, Progress, digest, free_disk, free_memory, plain_name, require_room

BUFFER = 65_536  # tokens that training shuffles at a time
FEWER = "Choose fewer positions, steps or tokens per image."


@dataclass(frozen=True)
class Captured:
    """A finished capture, and the host that it was made with."""

    folder: Path
    host: ComfyHost

    @property
    def store(self) -> ActivationStore:
        return ActivationStore(self.folder / "activations")


def texts_of(pairs: Sequence[PromptPair]) -> list[str]:
    """Every prompt of these pairs, in their order: the unsafe one, then the safe one."""
    return [text for pair in pairs for text in (pair.unsafe, pair.safe) if text is not None]


def names_in(text: str) -> list[str]:
    """Names separated by commas, spaces or lines, each once."""
    return list(dict.fromkeys(text.replace(",", " ").split()))


def capture_into(
    folder: Path,
    host: ComfyHost,
    pairs: Sequence[PromptPair],
    *,
    positions: Sequence[str],
    steps: int,
    tokens_per_image: int | None,
    seed: int,
    pairs_per_shard: int,
    given: Sequence[Conditioning] | None,
    negative: Conditioning | None,
    progress: Progress,
) -> tuple[Captured, str]:
    """Captures what is missing in `folder`; also returns the estimate of what that takes.

    Raises ValueError (StoreError) where the folder has activations of other settings, where a
    prompt can't be encoded, and where disk or memory are too small.
    """
    texts = texts_of(pairs)
    host.prepare(texts if given is not None else texts[:1], given, negative)
    settings = StoreSettings(
        architecture=host.architecture,
        positions=tuple(positions or host.architecture.positions()),
        model=host.name,
        prompts=tuple(pairs),
        steps=captured_steps(host.steps, steps),
        seed=seed,
        tokens_per_image=tokens_per_image,
        pairs_per_shard=pairs_per_shard,
        sampler=host.sampler,
    )
    store = folder / "activations"
    if store.is_dir() and not any(store.glob("shard-*")):
        (store / "store.json").unlink(missing_ok=True)  # nothing was captured: other settings may come
    writer = ActivationWriter.open(store, settings, host.tokens())
    missing = [writer.groups()[group] for group in writer.missing()]
    needed = [settings.prompts[pair] for group in missing for pair in group]
    estimate = require_room(_capture_needs(host, settings, missing, texts_of(needed), store), progress)
    host.prepare(texts_of(needed), progress=lambda done, total: progress("encoding prompts", done, total))
    capture(host, writer, lambda done, total: progress("capturing, shard", done, total))
    return Captured(folder, host), estimate


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


def train(
    captured: Captured,
    positions: Sequence[str],
    source: str,
    calibration: Sequence[PromptPair],
    recipe: Recipe,
    credits: Credits,
    progress: Progress,
    given: Sequence[Conditioning] | None = None,
) -> tuple[Dictionary, str]:
    """A dictionary for `source`, trained or taken up where a run was ended; and the estimate.

    Raises ValueError where prompts are too few or the same as the captured ones, and where disk or
    memory are too small.
    """
    store, host = captured.store, captured.host
    require_prompts(store, source, calibration)
    for position in positions:
        if position not in store.positions:
            raise ValueError(f"{position} was not captured, only {', '.join(store.positions)}.")
    identity = store.settings.to_json(), list(positions), source, asdict(recipe.train)
    everything = identity, asdict(recipe), fingerprint(calibration), asdict(credits), __version__
    path = captured.folder / "dictionaries" / f"{source}-{digest(*everything)}.safetensors"
    estimate = require_room(_train_needs(store, positions, recipe, path), progress)
    checkpoints = captured.folder / "checkpoints" / digest(*identity)
    checkpoints.mkdir(parents=True, exist_ok=True)

    def build(part: Path) -> None:
        _prepare(host, calibration, given, progress)
        build_dictionary(
            part,
            host,
            store,
            positions,
            source,
            calibration,
            recipe,
            title=credits.title or f"{source} for {host.architecture.family}",
            creator=credits.creator,
            licence=credits.licence,
            checkpoints=checkpoints,
            progress=progress,
            batch=host.batch,
        )

    _once(path, build)
    return Dictionary.open(path), estimate


def adapt(
    captured: Captured,
    dictionary: Dictionary,
    domain: str,
    source: str,
    calibration: Sequence[PromptPair],
    recipe: Recipe,
    credits: Credits,
    progress: Progress,
    given: Sequence[Conditioning] | None = None,
) -> tuple[Dictionary, str]:
    """`dictionary` with an adapter for `domain`; and the estimate. Raises ValueError as `train` does."""
    store, host = captured.store, captured.host
    dictionary.check_fits(store.architecture)
    if domain in dictionary.card.domains:
        raise ValueError(f"{dictionary.path.name} already has domain '{domain}': choose another.")
    require_prompts(store, domain, calibration)
    require_prompts(store, source, ())
    missing = [p for p in dictionary.card.positions if p not in store.positions]
    if missing:
        raise ValueError(
            f"{dictionary.path.name} needs activations at {', '.join(missing)}, which were not captured."
        )
    everything = store.settings.to_json(), dictionary.sha256, domain, source, asdict(recipe)
    name = digest(*everything, fingerprint(calibration), asdict(credits), __version__)
    path = captured.folder / "dictionaries" / f"{domain}-{name}.safetensors"
    positions = list(dictionary.card.positions)
    estimate = require_room(_train_needs(store, positions, recipe, path), progress)

    def build(part: Path) -> None:
        _prepare(host, calibration, given, progress)
        build_adapter(
            part,
            host,
            store,
            dictionary,
            domain,
            source,
            calibration,
            recipe,
            title=credits.title or f"{domain} for {dictionary.card.title}",
            creator=credits.creator,
            licence=credits.licence,
            progress=progress,
            batch=host.batch,
        )

    _once(path, build)
    return dictionary.with_adapters(path), estimate


def _once(path: Path, build: Callable[[Path], None]) -> None:
    """Lets `build` write `path`, unless it is there; what is there is always finished.

    Nodes run in inference mode, where nothing can be trained."""
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".unfinished")
    with torch.inference_mode(False), torch.enable_grad():
        build(part)
    os.replace(part, path)


def _prepare(
    host: ComfyHost,
    calibration: Sequence[PromptPair],
    given: Sequence[Conditioning] | None,
    progress: Progress,
) -> None:
    with torch.inference_mode():
        texts = texts_of(calibration)
        host.prepare(texts, given, progress=lambda done, total: progress("encoding prompts", done, total))


def _train_needs(store: ActivationStore, positions: Sequence[str], recipe: Recipe, path: Path) -> list[Need]:
    """For the dearest position: weights, gradients and Adam's two moments, the buffer that is shuffled,
    and the images that features are chosen on, in bfloat16 and twice in float32."""
    settings, architecture = store.settings, store.architecture
    images = sum(settings.sides(pair) for pair in range(len(settings.prompts))) // SELECT_EVERY + 1
    memory = disk = 0
    for position in positions:
        width = architecture.width_of(position)
        kept = store.images(position, store.indices()[:1]).shape[3]
        weights = 2 * 4 * recipe.train.features * width
        chosen = images * len(settings.steps) * kept * width * (2 + 4 + 4)
        memory = max(memory, max(4 * weights + 3 * 2 * BUFFER * width, chosen + 2 * weights))
        disk += weights * (3 + 2)  # its checkpoint; the file, and the one that it replaces
    remedy = "Choose fewer positions or features."
    return [
        Need("disk", 0 if path.exists() else disk, free_disk(path), remedy),
        Need("main memory", 0 if path.exists() else memory, free_memory(), remedy),
    ]


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
