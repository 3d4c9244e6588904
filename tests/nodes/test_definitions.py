"""Node definitions: what shared workflows rely on, and the example workflows that use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import templates
from tests.nodes.server import Server
from tests.nodes.test_translations import TRANSLATED, read

ROOT = Path(__file__).parents[2]
PACK = "ComfyUI-SafeDIG-main"  # the folder that Server puts it in
SNAPSHOT = Path(__file__).parent / "definitions.json"
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


@pytest.mark.parametrize("language", TRANSLATED)
def test_what_has_a_tooltip_has_it_in_every_language(language: str, definitions: dict[str, dict]) -> None:
    """test_translations.py compares the names; tooltips are known to a running ComfyUI alone."""
    translated = read(language, "nodeDefs")
    for name in translated:
        texts, definition = translated[name], definitions[name]
        given = definition["input"].get("required", {}) | definition["input"].get("optional", {})
        explained = {key for key, (_, *rest) in given.items() if rest and rest[0].get("tooltip")}
        assert {key for key, text in texts["inputs"].items() if "tooltip" in text} == explained, name
        outputs = {str(i) for i, tooltip in enumerate(definition["output_tooltips"] or ()) if tooltip}
        assert {key for key, text in texts["outputs"].items() if "tooltip" in text} == outputs, name


def test_a_search_finds_the_nodes(definitions: dict[str, dict]) -> None:
    """By name, and by further words where this version of ComfyUI knows them."""
    first = definitions["SafeDIGApplySteering"]
    for word in ("safety", "nsfw", "filter", "steering"):
        assert word in first["display_name"].lower()
    assert "SAE" in definitions["SafeDIGLoadDictionary"]["display_name"]
    if "search_aliases" in first:
        assert {"safety", "NSFW", "content filter", "SAE"} <= set(first["search_aliases"])
    ours = [name for name in definitions if name.startswith("SafeDIG")]
    assert ours[0] == "SafeDIGApplySteering"  # what the page suggests first for a dictionary's link


def test_the_page_gets_templates_and_languages(server: Server) -> None:
    names = {path.stem for path in templates.PATHS}
    assert set(server.get("/api/workflow_templates")[PACK]) == names
    words = server.get("/api/i18n")
    assert all("nodeDefs" in words[language] for language in TRANSLATED)
    assert all("safedig" in words[language] for language in ("en", *TRANSLATED))


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


@pytest.mark.parametrize("path", templates.PATHS, ids=lambda path: path.stem)
def test_example_workflows_load(path: Path, definitions: dict[str, dict]) -> None:
    workflow = json.loads(path.read_text())
    assert workflow["version"] == 0.4
    prompt = as_prompt(workflow, definitions)
    kinds = {node["class_type"] for node in prompt.values()}
    assert (MAKING if "Make a dictionary" in path.stem else STEERING) <= kinds


def opened(server: Server, number: int, definitions: dict[str, dict]) -> tuple[list[str], Any]:
    """The verdicts of a template as it is shipped, in the order of its receipts, and both pictures of what it
    shows side by side: [2, 3, 64, 64]."""
    import numpy as np
    from PIL import Image

    workflow = templates.workflow(number)
    result = server.run(as_prompt(workflow, definitions))
    assert result.error is None, result.error
    receipts = [node for node in workflow["nodes"] if node["type"] == "SafeDIGSteeringReceipt"]
    reports = [json.loads(result.outputs[str(node["id"])]["safedig_receipt"][0]) for node in receipts]
    assert all(report["as_planned"] for report in reports)
    (shown,) = [node for node in workflow["nodes"] if node.get("title") == "Before  |  after"]
    with Image.open(server.file(result.outputs[str(shown["id"])]["images"][0])) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255
    pixels = pixels.movedim(-1, 0)[:, 3::6, 3::6]  # six times enlarged
    return [report["verdict"] for report in reports], torch.stack([pixels[..., :64], pixels[..., -64:]])


@pytest.mark.parametrize(
    ("number", "verdicts", "risky", "keeps"),
    [(1, ["weapons steered"], "pistol", "cat"), (2, ["substances steered", "clear"], "beer", "dog")],
)
def test_what_opens_shows_a_risk_removed_and_no_false_alarm(
    server: Server, definitions: dict[str, dict], number: int, verdicts: list[str], risky: str, keeps: str
) -> None:
    """As it is shipped. After training the pocket model anew: python -m safedig_core.pocket.showcase"""
    from safedig_core.pocket.judge import risks
    from safedig_core.pocket.model import load_judge

    said, pictures = opened(server, number, definitions)
    before, after = load_judge().detect(pictures)
    assert said == verdicts
    assert before == {risky, keeps}
    assert keeps in after and not risks(after)
