"""What SafeDIG costs, as ratios to the plain work of the same run: DESIGN section 6.

FLUX.1 and SD3.5 run at their real widths and token counts with few blocks and random weights; the
forward time of the whole model is what one block takes times how many there are, plus the rest.
Each section has a process of its own, so that its memory is its own too.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..dictionary.dictionary import (
    Action,
    Card,
    Dictionary,
    Domain,
    Gate,
    PositionInfo,
    Witness,
    save_dictionary,
)
from ..evaluation import environment
from ..hosts.host import Host
from ..positions import Architecture
from ..progress import Progress
from ..prompts import PromptPair
from ..routing import route
from ..sae import SAE
from ..steering.steering import Steering
from ..store.capture import capture, store_settings
from ..store.settings import StoreSettings
from ..store.store import ActivationStore, ActivationWriter
from ..training import TrainSettings, train_sae
from .full_size import GRID, SHAPES, FullSizeHost
from .instruments import Kept, TimedHost, Watch, in_own_process, memory_mb

PAIRS = (
    PromptPair("weapons", "a cat and a book", "a cat and a pistol"),
    PromptPair("weapons", "a dog and a book", "a dog and a pistol"),
)


@dataclass(frozen=True)
class Scale:
    """How large the benchmark is; the default is the real models' size."""

    families: tuple[str, ...] = tuple(SHAPES)
    grid: int = GRID  # tokens a side
    words: int | None = None  # text tokens; as the real model has them
    tokens_kept: int = 256  # per image and step in capture
    features: int = 16_384
    harmful: int = 64  # features that act and tell
    dense_tokens: int = 128  # that dense SAEs are timed on; their work is proportional to tokens
    repeats: int = 3
    pairs: int = 4  # of the pocket model's prompts, for capture

    def __post_init__(self) -> None:
        for name in self.families:
            if name not in SHAPES:
                raise ValueError(f"unknown family '{name}': expected {', '.join(SHAPES)}")


def bench(
    progress: Progress,
    scale: Scale,
    store: Path | None = None,
    position: str = "double.1.img",
) -> dict[str, Any]:
    """The whole benchmark. With a captured `store`, also how fast and how well SAEs train on it."""
    total = len(scale.families) + 3
    result: dict[str, Any] = {"steering": [], "full_size": []}
    for done, family in enumerate(scale.families):
        progress(f"bench {family}", done, total)
        rows, figures = in_own_process(full_size, family, scale)
        result["steering"] += rows
        result["full_size"].append(figures)
    progress("bench dictionary", total - 3, total)
    result["dictionary"] = dictionary_figures(scale)
    progress("bench capture", total - 2, total)
    result["capture"] = in_own_process(capture_figures, scale)
    progress("bench training", total - 1, total)
    result["training"] = []
    if store is not None:
        from .libraries import training_rows  # pyright: ignore[reportMissingImports]

        result["training"] = training_rows(ActivationStore(store), position)
    progress("bench", total, total)
    return result | {"environment": environment()}


def sites(architecture: Architecture) -> tuple[str, ...]:
    """Three positions, as in the paper: the text, and the image after the first and the last block."""
    images = [name for name in architecture.positions() if name.endswith("img")]
    return "text", images[0], images[-1]


def plan(positions: tuple[str, ...], operator: str, form: str) -> list[Action]:
    return [Action(p, operator, form, 0.5, (1.0, 0.0), domain="weapons") for p in positions]


def write_dictionary(
    path: Path, architecture: Architecture, positions: tuple[str, ...], scale: Scale
) -> None:
    """A dictionary of random SAEs in bfloat16."""
    count, index = scale.features, list(range(scale.harmful))
    saes: dict[str, SAE] = {}
    for position in positions:
        width = architecture.width_of(position)
        noise = torch.randn(1024, width, generator=torch.Generator().manual_seed(0))
        rows = (noise * width**-0.5).bfloat16().repeat(-(-count // 1024), 1)[:count]
        zeros = torch.zeros(width)
        saes[position] = SAE(
            rows, torch.zeros(count), torch.full((count,), 2.0), rows, zeros, zeros, torch.tensor(1.0)
        )
    witness = Witness(index, [1.0] * len(index), 0.0, 1.0, (1.0, 0.0))
    domain = Domain(dict.fromkeys(positions, index), Gate(dict.fromkeys(positions, witness), 0.0, 0.0, 1))
    card = Card(
        architecture,
        positions={p: PositionInfo(scale.harmful) for p in positions},
        domains={"weapons": domain},
        plan=plan(positions, "repel", "residual"),
    )
    moved = torch.tensor(index, dtype=torch.int64)
    adapters = {(p, "weapons"): (moved, saes[p].decoder_weight[moved].clone()) for p in positions}
    save_dictionary(path, card, saes, adapters)


def full_size(family: str, scale: Scale) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Capture, routing, a steered forward pass and training steps of one family.

    Returns its steering rows, and what each of those took.
    """
    with tempfile.TemporaryDirectory() as folder:
        host = FullSizeHost(family, scale.grid, scale.words)
        positions, watch = sites(host.architecture), Watch()
        settings = StoreSettings(
            host.architecture,
            positions,
            family,
            PAIRS,
            (0,),
            tokens_per_image=scale.tokens_kept,
            pairs_per_shard=1,
        )
        watch.blocks(host.transformer)
        writer = ActivationWriter.open(Path(folder) / "store", settings)
        with watch("capture"):
            capture(cast(Host, TimedHost(host, watch)), writer)
        store = ActivationStore(writer.folder)
        # capture samples both sides of a pair in one batch
        blocks = {name: median(watch.seconds[name]) / 2 for name in host.shape.repeats}
        plain = [a - b for a, b in zip(watch.seconds["sample"], watch.seconds["tap"], strict=True)]
        rest = max(median(plain) / 2 - sum(blocks.values()), 0.0)
        forward = rest + sum(host.shape.repeats[name] * seconds for name, seconds in blocks.items())

        with watch("routing"):
            route(host, store, "weapons", "weapons", PAIRS, most_pairs=len(PAIRS))
        path = Path(folder) / "dictionary.safetensors"
        write_dictionary(path, host.architecture, positions, scale)
        dictionary = Dictionary.open(path)
        kept = Kept(Steering(dictionary).run())
        with watch("steered"):
            host.sample([PAIRS[0].safe], [0], kept)
        tokens = {position: a.shape[1] for position, a in kept.activations.items()}
        naive = sum(_naive(dictionary, p, a, scale) for p, a in kept.activations.items())
        rows = []
        for operator, form in (
            ("repel", "residual"),
            ("blend", "residual"),
            ("repel", "paper"),
            ("blend", "paper"),
        ):
            spent = _steering(dictionary, plan(positions, operator, form), kept.activations, scale)
            ratios = {"time_ratio": 1 + spent / forward, "naive_time_ratio": 1 + naive / forward}
            row = {"family": family, "operator": operator, "form": form, "positions": len(positions)}
            rows.append(row | ratios)
        training = TrainSettings(features=scale.features, k=32, steps=2, batch=1024)
        with watch("training"):
            train_sae(lambda epoch: store.batches(positions[-1], training.batch, epoch), training)
        return rows, {
            "family": family,
            "forward": "measured time of each kind of block x how many the real model has + the rest",
            "forward_s": forward,
            "block_s": blocks,
            "blocks": host.shape.repeats,
            "rest_s": rest,
            "width": host.architecture.width,
            "tokens": tokens,
            "capture_s": watch.seconds["capture"][0],
            "routing_s": watch.seconds["routing"][0],
            "training_step_s": watch.seconds["training"][0] / training.steps,
            "peak_mb": memory_mb("VmHWM"),
        }


def _steering(
    dictionary: Dictionary, actions: list[Action], activations: dict[str, Tensor], scale: Scale
) -> float:
    """Median seconds that steering adds to one evaluation of one image."""
    dense = (actions[0].operator, actions[0].form) == ("blend", "paper")
    run, times = Steering(dictionary, actions).run(), []
    run.begin(1, 1, torch.device("cpu"))
    for _ in range(scale.repeats + 1):
        run.step(0, 0.9, slice(0, 1))
        spent = 0.0
        for position, a in activations.items():
            part, share = _part(a, scale) if dense else (a, 1.0)
            began = time.perf_counter()
            run(position, part)
            spent += share * (time.perf_counter() - began)
        times.append(spent)
    return median(times[1:])


def _naive(dictionary: Dictionary, position: str, a: Tensor, scale: Scale) -> float:
    """Median seconds of Repel the naive way at one site: the whole SAE, and the CPU asks what fired."""
    sae, (part, share) = dictionary.sae(position), _part(a, scale)
    mask = (torch.arange(sae.features) < scale.harmful).float()
    times = []
    for _ in range(scale.repeats + 1):
        began = time.perf_counter()
        z = sae.encode(part.float()) * mask
        if z.any().item():
            _ = part - (0.5 * sae.decode(z)).to(part.dtype)
        times.append(share * (time.perf_counter() - began))
    return median(times[1:])


def _part(a: Tensor, scale: Scale) -> tuple[Tensor, float]:
    """The first tokens, and how many times as many there are."""
    part = a[:, : scale.dense_tokens]
    return part, a.shape[1] / part.shape[1]


def dictionary_figures(scale: Scale) -> dict[str, float]:
    """Opening a dictionary for steering, and loading all of it, in a fresh process each."""
    architecture = Architecture("flux", (19, 38), 3072, 4096)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dictionary.safetensors"
        write_dictionary(path, architecture, ("text", "double.18.img", "single.37.img"), scale)
        lazy, eager = (in_own_process(_opened, path, lazily) for lazily in (True, False))
        size = path.stat().st_size / 2**20
    names = {
        "open_s": lazy[0],
        "resident_mb": lazy[1],
        "eager_open_s": eager[0],
        "eager_resident_mb": eager[1],
    }
    return names | {"file_mb": size}


def _opened(path: Path, lazily: bool) -> tuple[float, float]:
    """Seconds, and MB that stay in memory."""
    before, began = memory_mb("VmRSS"), time.perf_counter()
    held = Steering(Dictionary.open(path)) if lazily else {k: v.clone() for k, v in load_file(path).items()}
    spent, after = time.perf_counter() - began, memory_mb("VmRSS")
    del held
    return spent, after - before


def capture_figures(scale: Scale) -> dict[str, float]:
    """What capture costs beside sampling and the disk, on the pocket model at all positions.

    overhead = (all that capture took - writing) / (sampling without the tap) - 1
    """
    from ..pocket.model import load_pocket
    from ..pocket.study import shipped

    host, watch = load_pocket(), Watch()
    settings = store_settings(host, shipped("train", ["weapons"])[: scale.pairs], pairs_per_shard=2)
    with tempfile.TemporaryDirectory() as folder:
        writer = ActivationWriter.open(folder, settings)
        write = writer.write

        def timed(group: int, tensors: dict[str, Tensor]) -> None:
            with watch("disk"):
                write(group, tensors)

        writer.write = timed  # type: ignore[method-assign]
        with watch("capture"):
            capture(cast(Host, TimedHost(host, watch)), writer)
    spent = {name: sum(seconds) for name, seconds in watch.seconds.items()}
    plain = spent["sample"] - spent["tap"]
    overhead = (spent["capture"] - spent["disk"]) / plain - 1
    return {"overhead": overhead, "sampling_s": plain, "disk_s": spent["disk"], "images": 2 * scale.pairs}


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    lines = []
    for r in result["steering"]:
        what = f"{r['family']:14} {r['operator']:6} {r['form']:9} at {r['positions']} positions"
        lines.append(f"{what}: {r['time_ratio']:.4f} of plain; naively {r['naive_time_ratio']:.3f}")
    for f in result["full_size"]:
        what = f"{f['family']:14} forward {f['forward_s']:.0f} s, training step {f['training_step_s']:.1f} s"
        lines.append(f"{what}, peak {f['peak_mb'] / 1024:.1f} GB")
    d, c = result["dictionary"], result["capture"]
    lines.append(
        f"dictionary of {d['file_mb']:.0f} MB: opened in {d['open_s']:.3f} s, {d['resident_mb']:.0f} MB; "
        f"loaded whole in {d['eager_open_s']:.2f} s, {d['eager_resident_mb']:.0f} MB"
    )
    lines.append(f"capture: {c['overhead']:.1%} over plain sampling and the disk")
    for r in result["training"]:
        speed = f"{r['tokens_per_s']:.0f} tokens/s"
        lines.append(f"training with {r['library']}: {speed}, fvu {r['fvu']:.3f}, l0 {r['l0']:.1f}")
    return "\n".join(lines)
