"""The templates as ComfyUI shows and opens them. tests/nodes and tests/web load, run and look at them."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import templates

TITLE = 30  # px of a node's title bar, above its place
AIR = 16  # px between nodes, at least
WIDEST_START = 1400  # px of the first template
NAMES = [
    "1 Try it, no download",
    "2 Two risks at once, no download",
    "3 Make a dictionary, no download",
    "4 FLUX.1-dev with your dictionary",
    "5 Make a dictionary for FLUX.1-dev",
    "6 SD3.5 Large with your dictionary",
    "7 Make a dictionary for SD3.5 Large",
]
DIRECTORIES = {
    "UNETLoader": "diffusion_models", "VAELoader": "vae", "CheckpointLoaderSimple": "checkpoints",
    "DualCLIPLoader": "text_encoders", "TripleCLIPLoader": "text_encoders",
}  # fmt: skip
USER_AND_MAKER = [(4, 5), (6, 7)]


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, title bar included."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y if node["flags"].get("collapsed") else y + height


def of_type(workflow: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [node for node in workflow["nodes"] if node["type"] == kind]


def test_they_are_numbered_and_named() -> None:
    assert [path.stem for path in templates.PATHS] == NAMES
    folder = templates.PATHS[0].parent
    assert {path.name for path in folder.iterdir()} == {
        f"{n}{end}" for n in NAMES for end in (".json", ".jpg")
    }


@pytest.mark.parametrize("path", templates.PATHS, ids=lambda path: path.stem)
def test_each_has_a_square_picture(path: Path) -> None:
    with Image.open(path.with_suffix(".jpg")) as picture:  # the page asks for no other ending
        assert picture.format == "JPEG" and picture.width == picture.height >= 400


@pytest.mark.parametrize("number", range(1, 8))
def test_nothing_overlaps(number: int) -> None:
    workflow = templates.workflow(number)
    for first, second in combinations(workflow["nodes"], 2):
        a, b = box(first), box(second)
        apart = a[2] + AIR <= b[0] or b[2] + AIR <= a[0] or a[3] + AIR <= b[1] or b[3] + AIR <= a[1]
        assert apart, f"{first.get('title', first['type'])} and {second.get('title', second['type'])}"


@pytest.mark.parametrize("number", range(1, 8))
def test_every_node_but_the_note_is_in_one_group(number: int) -> None:
    workflow = templates.workflow(number)
    for node in workflow["nodes"]:
        left, top, right, bottom = box(node)
        around = [
            group["title"]
            for group in workflow["groups"]
            for x, y, width, height in [group["bounding"]]
            if x < right and y < bottom and left < x + width and top < y + height
        ]
        assert len(around) == (node["type"] != "MarkdownNote"), f"{node.get('title', node['type'])}: {around}"


def test_the_first_fits_on_a_screen() -> None:
    groups = templates.workflow(1)["groups"]
    left = min(group["bounding"][0] for group in groups)
    right = max(group["bounding"][0] + group["bounding"][2] for group in groups)
    assert right - left <= WIDEST_START


@pytest.mark.parametrize("number", [4, 5, 6, 7])
def test_files_of_the_base_model_can_be_fetched(number: int) -> None:
    """By ComfyUI's own dialog for missing models: it takes https addresses of the Hub."""
    for node in templates.workflow(number)["nodes"]:
        if node["type"] not in DIRECTORIES:
            continue
        models = node["properties"]["models"]
        assert [model["name"] for model in models] == [
            value for value in node["widgets_values"] if value.endswith(".safetensors")
        ]
        for model in models:
            assert model["directory"] == DIRECTORIES[node["type"]]
            assert re.fullmatch(r"https://huggingface\.co/\S+/resolve/main/\S+\.safetensors", model["url"])
            assert model["url"].endswith("/" + model["name"])


@pytest.mark.parametrize(("user", "maker"), USER_AND_MAKER)
def test_what_needs_a_dictionary_names_the_template_that_makes_it(user: int, maker: int) -> None:
    (note,) = of_type(templates.workflow(user), "MarkdownNote")
    assert f"**{templates.path(maker).stem}**" in note["widgets_values"][0]
    (back,) = of_type(templates.workflow(maker), "MarkdownNote")
    assert f"**{templates.path(user).stem}**" in back["widgets_values"][0]
    (loader,) = of_type(templates.workflow(user), "SafeDIGLoadDictionary")
    (saver,) = of_type(templates.workflow(maker), "SafeDIGSaveDictionary")
    assert loader["widgets_values"][0] == f"{saver['widgets_values'][0]}.safetensors"
