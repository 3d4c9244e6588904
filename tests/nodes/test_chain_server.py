"""The offline chain in a real ComfyUI, with nodes alone: a dictionary is made by the shipped pocket
workflow, interrupted once in capture and once in training; it steers, and the command line makes it too."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from safedig_core.cli.parser import main
from safedig_core.dictionary.dictionary import Dictionary, check
from safedig_core.prompts import PromptPair, read_prompts, write_prompts
from safedig_core.routing import WEIGHTS
from safedig_core.store.store import ActivationStore
from tests import templates
from tests.nodes.server import Result, Server
from tests.nodes.test_definitions import as_prompt

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "safedig_core" / "pocket" / "prompts"
POSITIONS = ["double.1.img", "single.0.img"]
HARMLESS = ("a cat and a book", "a dog and a star", "a frog and a tree", "a cow and a ball")
# smaller than as shipped, to take minutes on a busy machine
FEWER = {
    "Capture Activations": {"name": "chain", "positions": ", ".join(POSITIONS), "pairs_per_shard": 4},
    "Route Positions": {"by_hand": ", ".join(POSITIONS)},
    "Train Dictionary": {"features": 512, "k": 16, "steps": 400, "batch": 512},
    "Save Dictionary": {"name": "made"},
    "Pairs to train on": {"file": "chain.jsonl", "domains": "", "most_per_domain": 0},
    "Pairs to calibrate on": {"file": "tune.csv", "domains": "", "most_per_domain": 0},
}


def pairs_of(name: str, counts: dict[str, int]) -> list[PromptPair]:
    """Some lines of each domain of a shipped set, spread over its risks."""
    found = []
    for domain, count in counts.items():
        mine = [pair for pair in read_prompts(PROMPTS / f"{name}.jsonl") if pair.domain == domain]
        found += mine[:: max(1, len(mine) // count)][:count]
    return found


class Chain:
    """The workflow as the API takes it, and its nodes by the names that a user sees."""

    def __init__(self, server: Server):
        self.server, self.definitions = server, server.get("/object_info")
        self.workflow = templates.workflow(3)
        self.folder = server.base / "output" / "safedig" / "chain"
        self.ids = {self._name(node): str(node["id"]) for node in self.workflow["nodes"]}

    def _name(self, node: dict) -> str:
        shown = self.definitions.get(node["type"], {}).get("display_name") or node["type"]
        return node.get("title", shown.split(" (")[0])

    def prompt(self, at: str = "", **changes: Any) -> dict[str, dict]:
        """With `changes` made at one node, or wherever a node has an input of that name."""
        prompt = as_prompt(self.workflow, self.definitions)
        for name, inputs in FEWER.items():
            prompt[self.ids[name]]["inputs"] |= inputs
        if at:
            prompt[self.ids[at]]["inputs"] |= changes
            return prompt
        for node in prompt.values():
            node["inputs"] |= {k: v for k, v in changes.items() if k in node["inputs"]}
        return prompt

    def output(self, result: Result, name: str) -> dict:
        assert result.error is None and not result.interrupted, result.error
        return result.outputs[self.ids[name]]

    def receipt(self, result: Result) -> dict:
        return json.loads(self.output(result, "Steering Receipt")["safedig_receipt"][0])

    def pictures(self, result: Result) -> tuple[torch.Tensor, torch.Tensor]:
        """Before and after, which the workflow shows side by side."""
        import numpy as np
        from PIL import Image

        (shown,) = self.output(result, "Before  |  after")["images"]
        with Image.open(self.server.file(shown)) as picture:
            both = torch.from_numpy(np.array(picture.convert("RGB")))
        return both[:, : len(both)], both[:, -len(both) :]  # squares


@pytest.fixture(scope="module")
def chain(server: Server) -> Chain:
    """With a prompt file and a smaller calibration set in ComfyUI's input folder."""
    pytest.importorskip("diffusers")
    folder = server.base / "input"
    write_prompts(folder / "chain.jsonl", pairs_of("train", {"weapons": 16, "substances": 12, "safe": 12}))
    tune = pairs_of("tune", {"weapons": 10, "substances": 10, "safe": 12})
    with (folder / "tune.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("domain", "unsafe", "safe"), *((p.domain, p.unsafe or "", p.safe) for p in tune)]
        )
    return Chain(server)


@pytest.fixture(scope="module")
def made(chain: Chain) -> dict[str, Any]:
    """Queued three times: interrupted in capture, in training, and left to finish."""
    shards = chain.folder / "activations"
    first = chain.server.run(
        chain.prompt(), seconds=900, interrupt_when=lambda: (shards / "shard-00001.json").exists()
    )
    captured = {path: path.stat().st_mtime_ns for path in shards.glob("shard-*.json")}
    checkpoints = "checkpoints/*/*.safetensors"
    second = chain.server.run(
        chain.prompt(), seconds=900, interrupt_when=lambda: any(chain.folder.glob(checkpoints))
    )
    steps = []
    for path in chain.folder.glob(checkpoints):
        with safe_open(path, "pt") as file:
            steps.append(json.loads(file.metadata()["training"])["step"])
    finished = any(chain.folder.glob("dictionaries/*.safetensors"))
    third = chain.server.run(chain.prompt(), seconds=900)
    return {"runs": (first, second, third), "captured": captured, "steps": steps, "finished": finished}


def test_it_is_interrupted_twice_and_goes_on_where_it_was(chain: Chain, made: dict[str, Any]) -> None:
    first, second, third = made["runs"]
    assert first.interrupted and second.interrupted and not third.interrupted
    groups = ActivationStore(chain.folder / "activations").settings.groups()
    assert 2 <= len(made["captured"]) < len(groups)
    assert {path: path.stat().st_mtime_ns for path in made["captured"]} == made["captured"]
    assert made["steps"] and not made["finished"]
    assert min(made["steps"]) >= 25 and sum(made["steps"]) < len(POSITIONS) * 400
    ActivationStore(chain.folder / "activations").verify()


def test_what_it_takes_and_what_came_out_is_shown(chain: Chain, made: dict[str, Any]) -> None:
    third = made["runs"][2]
    text = chain.output(third, "Train Dictionary")["text"][0]
    assert re.match(r"Estimated: disk: [\d.]+ MB of [\d.]+ GB; main memory: ", text)
    assert "domain weapons: " in text and "gate opens over" in text
    route = chain.output(third, "Route Positions")
    assert "chosen: double.1.img, single.0.img" in route["text"][0]
    assert chain.server.file(route["images"][0]).is_file()
    assert chain.output(third, "Save Dictionary")["text"] == ["made.safetensors\nmade-substances.safetensors"]
    capture = made["runs"][1].outputs[chain.ids["Capture Activations"]]["text"][0]
    assert "activations" in capture and str(chain.server.base) not in capture
    assert "Estimated: disk: " in chain.server.log.read_text()


def test_the_dictionary_steers_in_the_same_session(chain: Chain, made: dict[str, Any]) -> None:
    third = made["runs"][2]
    report = chain.receipt(third)
    assert report["as_planned"] and "weapons steered" in report["verdict"]
    assert not torch.equal(*chain.pictures(third))
    clear = 0
    for text in HARMLESS:
        run = chain.server.run(chain.prompt("Prompt: change me", text=text))
        report = chain.receipt(run)
        assert report["as_planned"] and report["verdict"] in ("clear", "weapons steered")
        same = torch.equal(*chain.pictures(run))
        assert same == (report["verdict"] == "clear")
        clear += same
    assert clear >= 3  # so short a training tells them apart most of the time


def test_what_is_there_is_not_captured_again(chain: Chain, made: dict[str, Any]) -> None:
    again = chain.server.run(chain.prompt("Prompt: change me", text="a cow and a book"))
    steps = ("Capture Activations", "Route Positions", "Train Dictionary", "Adapt Decoder")
    assert again.error is None and {chain.ids[name] for name in steps} <= set(again.cached)


def test_what_is_saved_is_whole_and_listed(chain: Chain, made: dict[str, Any]) -> None:
    folder = chain.server.base / "models" / "safedig"
    for name in ("made", "made-substances"):
        check(folder / f"{name}.safetensors")
    form, *rest = chain.server.get("/object_info")["SafeDIGLoadDictionary"]["input"]["required"]["dictionary"]
    assert "made.safetensors" in (form if isinstance(form, list) else rest[0]["options"])
    adapted = Dictionary.open(folder / "made.safetensors").with_adapters(
        folder / "made-substances.safetensors"
    )
    assert list(adapted.card.domains) == ["weapons", "substances"]


def test_the_command_line_makes_the_same_dictionary(
    chain: Chain, made: dict[str, Any], tmp_path: Path
) -> None:
    """On the same activations every tensor is the same to the last bit; what samples anew, the gate, the
    loss recovered and the way recovered, differs as far as noise levels do between the two hosts (by 0.0005
    at most); an action that hardly helps may stay out of one of the plans."""
    out = tmp_path / "d.safetensors"
    given = [
        "--store",
        str(chain.folder / "activations"),
        "--tune",
        str(chain.server.base / "input" / "tune.csv"),
    ]
    given += ["--source", "weapons", "--positions", ",".join(POSITIONS), "--work", str(tmp_path / "work")]
    given += ["--features", "512", "--k", "16", "--steps", "400", "--batch", "512", "--out", str(out)]
    assert main(["train", *given]) == 0
    by_nodes = Dictionary.open(chain.server.base / "models" / "safedig" / "made.safetensors")
    by_hand = Dictionary.open(out)
    ours, theirs = load_file(by_nodes.path), load_file(out)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, msg=name)
    mine, other = by_nodes.card.domains["weapons"], by_hand.card.domains["weapons"]
    assert mine.features == other.features
    assert all(action.score.keys() == {"score", *WEIGHTS} for action in by_nodes.card.plan)
    assert not any(action.score for action in by_hand.card.plan)  # nothing was routed
    trainings = [dict(d.card.training) for d in (by_nodes, by_hand)]
    assert trainings[0].pop("made_from") != trainings[1].pop("made_from")  # the titles differ
    assert trainings[0].pop("calibrated_on") != trainings[1].pop("calibrated_on")  # hosts have names
    tried = [dict(map(tuple, training.pop("tried"))) for training in trainings]
    both = tried[0].keys() & tried[1].keys()
    assert len(both) >= 4 and all(tried[0][plan] == pytest.approx(tried[1][plan], abs=0.02) for plan in both)
    for name in ("removal", "recovery"):
        assert trainings[0].pop(name) == pytest.approx(trainings[1].pop(name), abs=0.03)
    assert trainings[0] == trainings[1]
    assert mine.gate is not None and other.gate is not None
    assert mine.gate.witnesses.keys() == other.gate.witnesses.keys()
    for position, witness in mine.gate.witnesses.items():
        theirs = other.gate.witnesses[position]
        assert (witness.features, witness.weights) == (theirs.features, theirs.weights)
        assert (witness.offset, witness.scale) == pytest.approx((theirs.offset, theirs.scale), rel=0.05)
    for position, info in by_nodes.card.positions.items():
        assert info.quality == pytest.approx(by_hand.card.positions[position].quality, rel=1e-3)


def test_the_command_line_captures_the_same_activations(
    chain: Chain, made: dict[str, Any], tmp_path: Path
) -> None:
    """The two hosts draw the same noise; their noise levels are rounded differently after the first."""
    ours = ActivationStore(chain.folder / "activations")
    write_prompts(tmp_path / "some.jsonl", ours.prompts[:2])
    given = ["--prompts", str(tmp_path / "some.jsonl"), "--store", str(tmp_path / "store"), "--steps", "4"]
    assert main(["capture", *given, "--positions", ",".join(POSITIONS)]) == 0
    theirs = ActivationStore(tmp_path / "store")
    assert theirs.settings.steps == ours.settings.steps
    for position in POSITIONS:
        a, b = (store.images(position, [0, 1]).float() for store in (ours, theirs))
        wrong, whole = ((x.square().sum((0, 1, 3, 4))) for x in (a - b, b))
        error = (wrong / whole).sqrt()  # by step
        assert error[0] < 1e-3 and error.max() < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captured_steps": 3}, r"captured with other settings: steps"),
        ({"positions": "double.9.img"}, r"has no position 'double\.9\.img'"),
        ({"positions": "../../etc"}, r"'\.\./\.\./etc' is not a position"),
        ({"by_hand": "text"}, r"'text' was not captured"),
        ({"domain": "weapons"}, r"already has domain 'weapons'"),
        ({"domain": ""}, r"names no domain"),
        ({"source": "knives"}, r"'knives' was not captured, only weapons, substances"),
        ({"file": "chain.jsonl"}, r"39 of the 40 calibration prompts were captured too"),
        ({"domains": "knives"}, r"has no domain 'knives', only safe, substances, weapons"),
        ({"skip_per_domain": 100}, r"Nothing of .* is left"),
    ],
    ids=str,
)
def test_bad_input_is_told_in_words(chain: Chain, made: dict[str, Any], change: dict, message: str) -> None:
    assert re.search(message, chain.server.run(chain.prompt(**change)).message)


@pytest.mark.parametrize("at", ["Capture Activations", "Save Dictionary"])
@pytest.mark.parametrize("name", ["../up", "/etc/x", ".."])
def test_nothing_is_written_elsewhere(chain: Chain, made: dict[str, Any], name: str, at: str) -> None:
    def there() -> set[Path]:
        own = {chain.server.base / folder for folder in ("temp", "user")}
        return {path for path in chain.server.base.rglob("*") if own.isdisjoint(path.parents)}

    before = there()
    assert "can't be the name of a" in chain.server.run(chain.prompt(at, name=name)).message
    assert there() == before


def test_a_dictionary_that_is_there_is_kept(chain: Chain, made: dict[str, Any]) -> None:
    other = chain.server.base / "models" / "safedig" / "other.safetensors"
    other.write_bytes(b"someone else's")
    refused = chain.server.run(chain.prompt("Save Dictionary", name="other"))
    assert "other.safetensors is already there" in refused.message
    assert other.read_bytes() == b"someone else's"
    replaced = chain.server.run(chain.prompt("Save Dictionary", name="other", overwrite=True))
    assert replaced.error is None
    made_here = chain.server.base / "models" / "safedig" / "made.safetensors"
    assert other.read_bytes() == made_here.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "bad.jsonl",
            '{"domain": "safe", "safe": "a"}\n{"domain": "x"}\n',
            r"bad\.jsonl, line 2: it lacks 'safe'",
        ),
        (
            "bad.csv",
            "domain,unsafe,safe\nsafe,,a cat\nweapons,,a cat\n",
            r"bad\.csv, line 3: domain 'weapons' lacks",
        ),
    ],
)
def test_a_bad_prompt_file_is_refused_by_line(
    chain: Chain, made: dict[str, Any], name: str, content: str, message: str
) -> None:
    (chain.server.base / "input" / name).write_text(content)
    assert re.search(message, chain.server.run(chain.prompt(file=name)).message)
