"""Records what the stand-in answers, from a running ComfyUI with this pack:

    python -m tests.web.record http://127.0.0.1:8188 FOLDER

writes object_info.json (of the nodes in the example workflows), cards.json, receipt.json and heat.png.
Run it again when a node's inputs, a card or a receipt change, with FOLDER tests/web. Numbers in them, as of
dictionaries that were made anew, don't matter to the tests.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

ROOT = Path(__file__).parents[2]
CARDS = ("pocket-flux-weapons (bundled)", "pocket-flux-substances (bundled)")
PAGE = {"CheckpointLoaderSimple", "EmptyLatentImage"}  # of the page's own first workflow
NO_NODES = {"MarkdownNote", "Note", "Reroute"}


def main(url: str, folder: Path) -> None:
    def get(path: str, **query: str) -> bytes:
        with urllib.request.urlopen(f"{url}{path}?{urlencode(query)}", timeout=60) as answer:
            return answer.read()

    def write(name: str, value: Any) -> None:
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")

    known = json.loads(get("/object_info"))
    named = {name for name in known if name.startswith("SafeDIG")} | PAGE
    for path in (ROOT / "example_workflows").glob("*.json"):
        named |= {node["type"] for node in json.loads(path.read_text("utf-8"))["nodes"]} - NO_NODES
    write("object_info.json", {name: known[name] for name in sorted(named)})

    cards = {name: json.loads(get("/safedig/card", dictionary=name)) for name in CARDS}
    write("cards.json", cards | {"flux": of_full_size(cards[CARDS[0]])})

    output = run(url, get)
    write("receipt.json", {name: output[name] for name in ("safedig_view", "text")})
    (file,) = json.loads(output["safedig_view"][0])["heat"]
    (folder / "heat.png").write_bytes(get("/view", **file))


def of_full_size(card: dict) -> dict:
    """A card as a dictionary for FLUX.1-dev would have it."""
    blocks = [("double", 19), ("single", 38)]
    names = [
        f"{kind}.{i}.{stream}" for kind, count in blocks for i in range(count) for stream in ("txt", "img")
    ]
    at = ["text", "double.5.txt", "single.30.txt"]
    at += [*(f"double.{i}.img" for i in range(2, 16)), *(f"single.{i}.img" for i in range(34))]
    groups = {"t": "text", "d": "bind", "s": "render"}
    plan = [
        ["text", "blend", 1.0],
        ["double.3.img", "blend", 2.0],
        ["double.7.img", "repel", 0.5],
        ["single.20.img", "blend", 1.5],
    ]
    return card | {
        "title": "of full size",
        "model": "flux model (19 double + 38 single blocks, width 3072, text width 4096, pooled width 768)",
        "all_positions": ["pooled", "text", *names],
        "positions": {name: groups[name[0]] for name in at},
        "plan": plan,
        "scores": {"double.3.img": 0.41, "double.7.img": 0.3, "single.20.img": 0.22, "text": 0.1},
        "witnesses": {"weapons": ["text", "single.20.img"]},
    }  # fmt: skip


def run(url: str, get: Any) -> dict:
    """What the receipt of the pocket model says of a risky prompt."""
    nodes: dict[str, tuple[str, dict]] = {
        "1": ("SafeDIGLoadPocketModel", {"name": "pocket-flux"}),
        "2": ("SafeDIGLoadDictionary", {"dictionary": CARDS[0], "reference": ""}),
        "3": ("SafeDIGApplySteering", {
            "model": ["1", 0], "dictionary": ["2", 0], "strength": 1.0, "action": "steer",
            "action_per_domain": "", "policy": "block", "branch": "positive", "gate": True,
            "preserve_norm": False}),
        "4": ("CLIPTextEncode", {"text": "a cat next to a pistol", "clip": ["1", 1]}),
        "5": ("CLIPTextEncode", {"text": "", "clip": ["1", 1]}),
        "6": ("EmptySD3LatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "7": ("KSampler", {
            "model": ["3", 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["6", 0],
            "seed": 7, "steps": 10, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple",
            "denoise": 1.0}),
        "8": ("VAEDecode", {"samples": ["7", 0], "vae": ["1", 2]}),
        "9": ("SafeDIGSteeringReceipt", {"images": ["8", 0], "receipt": ["3", 1]}),
    }  # fmt: skip
    prompt = {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}
    body = json.dumps({"prompt": prompt}).encode()
    request = urllib.request.Request(f"{url}/prompt", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        number = json.loads(answer.read())["prompt_id"]
    while not (history := json.loads(get(f"/history/{number}"))):
        time.sleep(1)
    return history[number]["outputs"]["9"]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
