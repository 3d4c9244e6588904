"""A workflow that is saved on one machine and run on another: two real ComfyUIs, one Hub."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from safedig_core.dictionary.card import Action
from safedig_core.dictionary.dictionary import Dictionary
from safedig_core.hub.index import Location, Reference, entry_for, index_text
from safedig_core.pocket.model import WEIGHTS
from safedig_core.positions import Architecture
from tests import templates
from tests.hub.hub_server import FakeHub, Handler, held
from tests.nodes.server import Server
from tests.nodes.test_definitions import as_prompt
from tests.nodes.test_server import graph, latent, receipt
from tests.tiny import TINY, write_dictionary


@pytest.fixture(scope="module")
def another(comfyui: Path, fake_hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ComfyUI without any dictionary."""
    running = Server(comfyui, tmp_path_factory.mktemp("another"), fake_hub.environment())
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def published(
    fake_hub: FakeHub, folder: Path, name: str, architecture: Architecture
) -> tuple[Dictionary, Reference]:
    plan = [Action("double.1.img", "repel", "residual", 1.0)]
    made = write_dictionary(folder / f"{name}.safetensors", plan, architecture=architecture)
    revision = fake_hub.put(f"some-one/{name}", {made.path.name: made.path.read_bytes()})
    return made, Reference(Location(f"some-one/{name}", revision, made.path.name), made.sha256)


def pixels(server: Server, prompt: dict) -> dict[str, str]:
    """Hashes of the pictures that a prompt gives, by the kind of node that saves them."""
    from PIL import Image

    result = server.run(prompt)
    assert result.error is None, result.error
    found = {}
    for number, node in prompt.items():
        for image in result.outputs.get(number, {}).get("images", ()):
            if node["class_type"] in ("SaveImage", "PreviewImage"):
                with Image.open(server.file(image)) as picture:
                    found[number] = hashlib.sha256(picture.tobytes()).hexdigest()
    return found


def test_the_other_machine_fetches_it_and_gives_the_same_picture(
    server: Server, another: Server, fake_hub: FakeHub, tmp_path: Path
) -> None:
    from safetensors import safe_open

    with safe_open(WEIGHTS / "pocket-flux.safetensors", "pt") as weights:
        width, text_width = weights.get_slice("txt_in.weight").get_shape()
        _, pooled_width = weights.get_slice("vector_in.in_layer.weight").get_shape()
        names = [name.split(".") for name in weights.keys()]
    double, single = (
        1 + max(int(n[1]) for n in names if n[0] == kind) for kind in ("double_blocks", "single_blocks")
    )
    architecture = Architecture("flux", (double, single), width, text_width, pooled_width)
    made, reference = published(fake_hub, tmp_path, "pocket", architecture)
    entry = entry_for(made.path, made.card, "pocket", hub=reference.where)
    folder = server.base / "models" / "safedig"
    (folder / "further.json").write_text(index_text([entry]))

    # As the web page saves it: the choice of the list, and the reference that the choice filled in.
    definitions = server.get("/object_info")
    form, *options = definitions["SafeDIGLoadDictionary"]["input"]["required"]["dictionary"]
    assert "pocket (hub)" in (form if isinstance(form, list) else options[0]["options"])
    (line,) = [line for line in server.get("/safedig/list") if line["name"] == "pocket (hub)"]
    assert line["state"] == "not downloaded" and line["size"] == entry.size
    saved = templates.workflow(1)
    (loader,) = [node for node in saved["nodes"] if node["type"] == "SafeDIGLoadDictionary"]
    loader["widgets_values"] = [line["name"], line["reference"]]
    for node in saved["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 4  # steps
    assert not fake_hub.requests
    here = pixels(server, as_prompt(saved, definitions))
    assert len(set(here.values())) >= 2  # the plain picture and the steered one
    fetched = len(fake_hub.ranges())
    assert fetched and not list((another.base / "models" / "safedig").rglob("*.safetensors"))

    there = pixels(another, as_prompt(saved, another.get("/object_info")))
    assert there == here
    assert len(fake_hub.ranges()) == 2 * fetched
    (path,) = (another.base / "models" / "safedig" / "hub").glob("*.safetensors")
    assert path.read_bytes() == made.path.read_bytes()
    card = another.get(f"/safedig/card?{urlencode({'dictionary': 'x', 'reference': line['reference']})}")
    assert card["state"] == "downloaded" and card["plan"] == [["double.1.img", "repel", 1.0]]

    # without the reference it can't be found there, and that is said before anything runs
    bare = as_prompt(saved, definitions)
    for node in bare.values():
        node["inputs"].pop("reference", None)
    _, answer = another.queue(bare)
    assert "There is no dictionary 'pocket (hub)'" in json.dumps(answer["node_errors"])
    assert "safedig:// reference" in json.dumps(answer["node_errors"])


def test_cancel_ends_a_download_and_the_next_run_goes_on(
    another: Server, fake_hub: FakeHub, tmp_path: Path
) -> None:
    made, reference = published(fake_hub, tmp_path, "tiny", TINY)
    nodes = graph()
    nodes["dictionary"]["inputs"] = {"dictionary": "whatever", "reference": str(reference)}
    done = threading.Event()
    fake_hub.store = held(done)
    before = len(fake_hub.ranges())
    try:
        began: list[float] = []

        def fetching() -> bool:
            if len(fake_hub.ranges()) > before:
                began.append(time.monotonic())
            return bool(began)

        assert another.run(nodes, interrupt_when=fetching).interrupted
        assert time.monotonic() - began[0] < 5
    finally:
        done.set()
        fake_hub.store = Handler.send_range
    local = copy.deepcopy(nodes)
    (another.base / "models" / "safedig" / "tiny.safetensors").write_bytes(made.path.read_bytes())
    local["dictionary"]["inputs"] = {"dictionary": "tiny.safetensors"}
    result = another.run(nodes)
    assert receipt(result)["dictionary"]["sha256"] == reference.sha256
    assert latent(another, result).equal(latent(another, another.run(local)))


def test_what_the_hub_refuses_is_told_at_the_node(another: Server, fake_hub: FakeHub, tmp_path: Path) -> None:
    _, reference = published(fake_hub, tmp_path, "gated", TINY)
    nodes = graph()
    nodes["dictionary"]["inputs"] = {"dictionary": "whatever", "reference": str(reference)}
    fake_hub.refused["some-one/gated"] = (403, {"X_Error_Code": "GatedRepo"})
    refused = another.run(nodes)
    assert "some-one/gated/gated.safetensors: its repository is gated" in refused.message
    assert refused.error and refused.error["node_id"] == "dictionary"
    del fake_hub.refused["some-one/gated"]
    fake_hub.store = Handler.send_wrong
    try:
        assert "is not what was asked for" in another.run(nodes).message
    finally:
        fake_hub.store = Handler.send_range
    assert receipt(another.run(nodes))["as_planned"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("some-one/tiny", "is a repository, which may change"),
        ("safedig://some-one/tiny@main/tiny.safetensors#sha256=0", "is not a full commit"),
        ("https://example.org/tiny.safetensors", "is not a reference"),
    ],
)
def test_a_reference_that_is_none_is_refused_before_it_runs(
    another: Server, fake_hub: FakeHub, reference: str, message: str
) -> None:
    nodes = graph()
    nodes["dictionary"]["inputs"] = {"dictionary": "whatever", "reference": reference}
    before = len(fake_hub.requests)
    status, answer = another.queue(nodes)
    assert status == 400 and message in json.dumps(answer["node_errors"])
    assert len(fake_hub.requests) == before
