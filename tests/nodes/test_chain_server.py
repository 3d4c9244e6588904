"""A dictionary made inside a real ComfyUI with nodes alone, interrupted twice; it then steers."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from safedig_core.activations import ActivationStore
from safedig_core.dictionary import Dictionary, check
from safedig_core.pocket.model import WEIGHTS
from safedig_core.prompts import read_prompts, write_prompts
from tests.nodes.server import Result, Server
from tests.nodes.test_definitions import seen

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "safedig_core" / "pocket" / "prompts"
POSITIONS = ["double.1.img", "single.0.img"]
SAMPLER = {
    "steps": 16, "cfg": 2.5, "sampler": "euler", "scheduler": "simple", "width": 128, "height": 128,
    "negative_prompt": "",
}  # fmt: skip
CAPTURE = SAMPLER | {
    "name": "chain", "positions": ", ".join(POSITIONS), "captured_steps": 4, "tokens_per_image": 0,
    "pairs_per_shard": 4, "first_seed": 0,
}  # fmt: skip
TRAINING = {"kind": "batch_topk", "features": 512, "k": 16, "steps": 400, "batch": 512, "training_seed": 0}
RECIPE = {
    "blend": 1.0, "repel": 0.5, "window_end": 0.5, "title": "made by nodes", "creator": "tests",
    "data_licence": "CC0-1.0", "weights_licence": "CC0-1.0",
}  # fmt: skip


def node(kind: str, /, **given: Any) -> dict:
    return {"class_type": f"SafeDIG{kind}", "inputs": given}


def pairs_of(name: str, counts: dict[str, int]) -> list:
    """The first lines of each domain of a shipped set, each risk with several objects."""
    found = []
    for domain, count in counts.items():
        mine = [pair for pair in read_prompts(PROMPTS / f"{name}.jsonl") if pair.domain == domain]
        found += mine[:: max(1, len(mine) // count)][:count]
    return found


def chain(**changes: dict) -> dict[str, dict]:
    """Load, capture, route, train, adapt, save; `changes` are made to a node's inputs."""
    nodes = {
        "pocket": node("LoadPocketModel", name="pocket-flux"),
        "prompts": node("LoadPromptPairs", file="chain.jsonl", domains="", skip_per_domain=0, most_per_domain=0),
        "tune": node("LoadPromptPairs", file="tune.csv", domains="", skip_per_domain=0, most_per_domain=0),
        "capture": node(
            "CaptureActivations", model=["pocket", 0], clip=["pocket", 1], prompts=["prompts", 0], **CAPTURE
        ),
        "route": node(
            "RoutePositions", activations=["capture", 0], source="weapons", target="substances",
            target_pairs=16, by_hand=", ".join(POSITIONS),
        ),
        "train": node(
            "TrainDictionary", activations=["capture", 0], positions=["route", 0], calibration=["tune", 0],
            source="weapons", **TRAINING, **RECIPE,
        ),
        "adapt": node(
            "AdaptDecoder", activations=["capture", 0], dictionary=["train", 0], calibration=["tune", 0],
            domain="substances", source="weapons", **RECIPE,
        ),
        "save": node("SaveDictionary", dictionary=["adapt", 0], name="made", overwrite=False),
    }  # fmt: skip
    for name, change in changes.items():
        nodes[name]["inputs"] |= change
    return nodes


def steered(prompt: str, dictionary: dict[str, dict], source: list) -> dict[str, dict]:
    """A picture, plain and steered by the dictionary that `source` gives."""

    def core(kind: str, /, **given: Any) -> dict:
        return {"class_type": kind, "inputs": given}

    sampler = {"seed": 7, "steps": 16, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple"}
    sampler |= {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    return dictionary | {
        "positive": core("CLIPTextEncode", text=prompt, clip=["pocket", 1]),
        "negative": core("CLIPTextEncode", text="", clip=["pocket", 1]),
        "latent": core("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "apply": node(
            "ApplySteering", model=["pocket", 0], dictionary=source, strength=1.0, action="steer",
            action_per_domain="", policy="block", branch="positive", gate=True, preserve_norm=False,
        ),
        "plain": core("KSampler", model=["pocket", 0], denoise=1.0, **sampler),
        "steered": core("KSampler", model=["apply", 0], denoise=1.0, **sampler),
        "before": core("VAEDecode", samples=["plain", 0], vae=["pocket", 2]),
        "after": core("VAEDecode", samples=["steered", 0], vae=["pocket", 2]),
        "receipt": node("SteeringReceipt", images=["after", 0], receipt=["apply", 1]),
        "preview": core("PreviewImage", images=["before", 0]),
        "saved": core("SaveImage", images=["receipt", 0], filename_prefix="chain"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def work(server: Server) -> Path:
    """The folder of the run, with prompts in ComfyUI's input folder."""
    if not (WEIGHTS / "pocket-flux.safetensors").is_file():
        pytest.skip("the pocket weights are not here")
    folder = server.base / "input"
    captured = pairs_of("train", {"weapons": 16, "substances": 12, "safe": 12})
    write_prompts(folder / "chain.jsonl", captured)
    tune = pairs_of("tune", {"weapons": 10, "substances": 10, "safe": 12})
    lines = ["domain,unsafe,safe", *(f"{p.domain},{p.unsafe or ''},{p.safe}" for p in tune)]
    (folder / "tune.csv").write_text("\n".join(lines) + "\n")
    return server.base / "output" / "safedig" / "chain"


@pytest.fixture(scope="module")
def made(server: Server, work: Path) -> dict[str, Any]:
    """Runs the chain to its end, interrupted once in capture and once in training."""
    shards = work / "activations"
    first = server.run(chain(), interrupt_when=lambda: len(list(shards.glob("shard-*.json"))) >= 2)
    left = {path.name: path.stat().st_mtime_ns for path in shards.glob("shard-*")}
    began: list[float] = []

    def training() -> bool:
        if any(work.glob("checkpoints/*")):
            began.append(time.monotonic())
        return bool(began) and time.monotonic() > began[0] + 1.0

    second = server.run(chain(), interrupt_when=training)
    checkpoints = {path: path.stat().st_size for path in work.glob("checkpoints/*/*.safetensors")}
    from safetensors import safe_open

    steps = []
    for path in checkpoints:
        with safe_open(path, "pt") as file:
            steps.append(json.loads(file.metadata()["training"])["step"])
    third = server.run(chain())
    return {"runs": (first, second, third), "left": left, "steps": steps}
