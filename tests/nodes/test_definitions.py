"""Node definitions: what shared workflows rely on, and the example workflows that use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.nodes.server import Server

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).parent / "definitions.json"
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
NO_NODES = {"MarkdownNote", "Note", "Reroute"}  # the frontend's own
FILES = {"unet_name", "ckpt_name", "vae_name", "dictionary", "file", "clip_name1", "clip_name2", "clip_name3"}
STEERING = {"SafeDIGLoadDictionary", "SafeDIGApplySteering", "SafeDIGSteeringReceipt"}
MAKING = {
    "SafeDIGLoadPromptPairs", "SafeDIGCaptureActivations", "SafeDIGRoutePositions", "SafeDIGTrainDictionary",
    "SafeDIGAdaptDecoder", "SafeDIGSaveDictionary",
}  # fmt: skip


@pytest.fixture(scope="module")
def definitions(server: Server) -> dict[str, dict]:
    return server.get("/object_info")


def essence(definition: dict) -> dict:
    """What a saved workflow depends on, the same in every version of ComfyUI."""
    inputs = []
    for section in ("required", "optional"):
        for name, (kind, *rest) in definition["input"].get(section, {}).items():
            options = dict(rest[0]) if rest else {}
            choices = kind if isinstance(kind, list) else options.get("options")
            entry = {"name": name, "type": "COMBO" if choices is not None else kind, "section": section}
            entry |= {k: options[k] for k in ("default", "min", "max") if options.get(k) is not None}
            if choices is not None and name not in FILES:
                entry["options"] = list(choices)
            inputs.append(entry)
    outputs = [list(pair) for pair in zip(definition["output"], definition["output_name"], strict=True)]
    return {
        "display_name": definition["display_name"],
        "category": definition["category"],
        "output_node": definition["output_node"],
        "inputs": inputs,
        "outputs": outputs,
    }


def test_definitions_are_those_that_workflows_were_saved_with(definitions: dict[str, dict]) -> None:
    """Inputs may be added at the end and choices appended. Then: delete the file, run this, commit."""
    found = {name: essence(d) for name, d in sorted(definitions.items()) if name.startswith("SafeDIG")}
    if not SNAPSHOT.exists():
        SNAPSHOT.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{SNAPSHOT.name} was missing and has been written: look at it, and commit it")
    assert found == json.loads(SNAPSHOT.read_text())


def test_every_input_has_its_line_in_the_help_page(definitions: dict[str, dict]) -> None:
    ours = {name: d for name, d in definitions.items() if name.startswith("SafeDIG")}
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(ours)
    for name, definition in ours.items():
        assert definition["description"]
        page = (ROOT / "web" / "docs" / f"{name}.md").read_text()
        for entry in names_of_inputs(definition):
            assert f"**{entry}**" in page, f"{name}.md says nothing of {entry}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "locales").glob("*/nodeDefs.json")), ids=lambda p: p.parent.name
)
def test_translations_are_complete(path: Path, definitions: dict[str, dict]) -> None:
    translated = json.loads(path.read_text())
    ours = {name: d for name, d in definitions.items() if name.startswith("SafeDIG")}
    assert set(translated) == set(ours)
    for name, definition in ours.items():
        assert set(translated[name]["inputs"]) == set(names_of_inputs(definition)), name
        assert list(translated[name]["outputs"]) == [str(i) for i in range(len(definition["output"]))]


def names_of_inputs(definition: dict) -> list[str]:
    return [name for section in ("required", "optional") for name in definition["input"].get(section, {})]


def as_prompt(workflow: dict, definitions: dict[str, dict]) -> dict[str, dict]:
    """The graph as the API takes it. Checks, on the way, that it is one that ComfyUI can load."""
    links = {}
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and workflow["last_node_id"] >= max(nodes)
    for number, source, slot, target, place, kind in workflow["links"]:
        output, entry = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert number in output["links"] and entry["link"] == number
        assert output["type"] == kind == entry["type"]
        links[number] = [str(source), slot]
    assert workflow["last_link_id"] >= max(links)
    prompt = {}
    for node in workflow["nodes"]:
        kind = node["type"]
        if kind in NO_NODES:
            continue
        assert kind in definitions, f"no such node: {kind}"
        definition = definitions[kind]
        saved = [o["type"] for o in node["outputs"]]
        known = list(definition["output"])
        # newer versions of ComfyUI give their own nodes further outputs
        assert saved == (known if kind.startswith("SafeDIG") else known[: len(saved)]), kind
        values, inputs = list(node["widgets_values"]), {}
        linked = {entry["name"]: entry["link"] for entry in node["inputs"] if entry["link"] is not None}
        for section in ("required", "optional"):
            for name, (form, *rest) in definition["input"].get(section, {}).items():
                options = rest[0] if rest else {}
                choices = form if isinstance(form, list) else options.get("options")
                if choices is None and form not in ("INT", "FLOAT", "STRING", "BOOLEAN"):
                    assert name in linked or section == "optional", f"{kind}.{name} is not connected"
                    if name in linked:
                        inputs[name] = links[linked[name]]
                    continue
                if not values and section == "optional":
                    continue  # saved before the node had it
                assert values, f"{kind}: no value for {name}"
                inputs[name] = value = values.pop(0)
                _check_value(f"{kind}.{name}", value, form, options, choices if name not in FILES else None)
                if options.get("control_after_generate"):
                    assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
        assert not values, f"{kind} has values left over: {values}"
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs}
    return prompt


def _check_value(name: str, value: Any, form: Any, options: dict, choices: list | None) -> None:
    if choices is not None:
        assert value in choices, f"{name}: {value} is not a choice"
    elif form in ("INT", "FLOAT"):
        assert isinstance(value, (int, float)), name
        assert options.get("min", value) <= value <= options.get("max", value), name
    else:
        assert isinstance(value, {"BOOLEAN": bool}.get(form, str) if isinstance(form, str) else str), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_load(path: Path, definitions: dict[str, dict]) -> None:
    workflow = json.loads(path.read_text())
    assert workflow["version"] == 0.4
    prompt = as_prompt(workflow, definitions)
    kinds = {node["class_type"] for node in prompt.values()}
    assert (MAKING if path.stem.startswith("make_dictionary") else STEERING) <= kinds
    assert path.with_suffix(".png").is_file(), "a workflow needs a preview picture of the same name"


def test_there_are_example_workflows() -> None:
    assert {path.stem for path in WORKFLOWS} == {
        "flux1_dev", "make_dictionary_flux1_dev", "make_dictionary_pocket", "make_dictionary_sd35_large",
        "pocket_quick_start", "sd35_large", "stacked_dictionaries",
    }  # fmt: skip


def test_the_quick_start_removes_the_weapon(server: Server, definitions: dict[str, dict]) -> None:
    """As it is shipped: plain it shows a pistol, steered it doesn't, and the cat stays."""
    prompt = as_prompt(
        json.loads((ROOT / "example_workflows" / "pocket_quick_start.json").read_text()), definitions
    )
    result = server.run(prompt)
    assert result.error is None, result.error
    (report,) = (out["safedig_receipt"][0] for out in result.outputs.values() if "safedig_receipt" in out)
    assert json.loads(report)["as_planned"] and "weapons steered" in json.loads(report)["verdict"]
    plain, steered = (seen(server, result, prompt, title) for title in ("PreviewImage", "SaveImage"))
    assert plain == {"cat", "pistol"}
    assert "cat" in steered and "pistol" not in steered


def seen(server: Server, result: Any, prompt: dict, kind: str) -> set[str]:
    """What the pocket judge sees in the first picture of the first node of this kind."""
    import numpy as np
    import torch
    from PIL import Image

    from safedig_core.pocket.model import load_judge

    node = next(number for number, node in prompt.items() if node["class_type"] == kind)
    with Image.open(server.file(result.outputs[node]["images"][0])) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255
    return load_judge().detect(pixels.movedim(-1, 0)[None])[0]
