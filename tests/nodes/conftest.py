"""Fixtures: the pack as ComfyUI would import it, and the worlds that contracts are tried in."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from safedig_core.dictionary.dictionary import Action
from safedig_core.families import FAMILIES
from tests.hub.hub_server import FakeHub
from tests.nodes import real, standin
from tests.nodes.server import Server
from tests.tiny import TINY, TINY_SD3, write_dictionary

ROOT = Path(__file__).parents[2]
COMFYUI = Path(os.environ["COMFYUI_PATH"]) if os.environ.get("COMFYUI_PATH") else None
NO_COMFYUI = "COMFYUI_PATH does not name a ComfyUI folder: the tests against the real one are left out"

# The pack's own folder must not be on sys.path (ComfyUI has a module 'nodes' of its own), and its
# __init__ needs ComfyUI. So its packages are made here, and their modules imported as usual.
PACK = "safedig_pack"
for name, folder in ((PACK, ROOT), (f"{PACK}.nodes", ROOT / "nodes")):
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def pack_module(name: str) -> Any:
    """A module of the pack, such as nodes.patching."""
    return importlib.import_module(f"{PACK}.{name}")


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the real ComfyUI."""
    if COMFYUI is None or not (COMFYUI / "main.py").is_file():
        pytest.skip(NO_COMFYUI)
    return COMFYUI


@pytest.fixture(scope="session")
def fake_hub() -> Iterator[FakeHub]:
    """The Hub of every ComfyUI that is started here."""
    fake = FakeHub()
    yield fake
    fake.close()


@pytest.fixture(scope="session")
def server(comfyui: Path, fake_hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI with dictionaries for the tiny models, one of them cut short."""
    base = tmp_path_factory.mktemp("comfyui")
    folder = base / "models" / "safedig"
    folder.mkdir(parents=True)
    for name, position, architecture in (("flux", "double.1.img", TINY), ("sd3", "joint.1.img", TINY_SD3)):
        plan = [Action(position, "repel", "residual", 1.0)]
        write_dictionary(folder / f"{name}.safetensors", plan, architecture=architecture)
    whole = (folder / "flux.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    running = Server(comfyui, base, fake_hub.environment())
    try:
        running.wait()
        yield running
    finally:
        running.stop()


@pytest.fixture(params=["stand-in", "ComfyUI"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "stand-in":
        yield standin.World(monkeypatch)
    else:
        real.load(request.getfixturevalue("comfyui"))
        with torch.inference_mode():  # as nodes are executed
            yield real.World(monkeypatch)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param
