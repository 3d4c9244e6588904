"""The policy file: its reader and its schema agree."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from safedig_core.dictionary.dictionary import Action
from safedig_core.policy import Policy, PolicyError
from safedig_core.steering.steering import Steering
from tests.tiny import write_dictionary

DOCS = Path(__file__).parents[1] / "docs"
SCHEMA = jsonschema.Draft202012Validator(json.loads((DOCS / "policy.schema.json").read_text()))


@pytest.fixture
def usual(tmp_path: Path) -> dict[str, Any]:
    """A policy that holds, beside its files."""
    path = tmp_path / "flux.safetensors"
    write_dictionary(path, [Action("double.1.img", "repel", "residual", 1.0)], domains=("weapons", "shock"))
    (tmp_path / "key").write_bytes(b"k" * 32)
    return {
        "format": 1,
        "dictionaries": [{"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}],
        "domains": {"weapons": {"action": "stop", "strength": 2, "policy": "warn"}},
        "exempt_models": ["RT_DETR_v4"],
        "signing_key": "key",
        "audit": {"file": "audit.jsonl", "megabytes": 1, "files": 1},
    }


def read(folder: Path, content: dict[str, Any]) -> Policy:
    path = folder / "policy.json"
    path.write_text(json.dumps(content))
    return Policy(path)


def test_a_policy_is_read(tmp_path: Path, usual: dict[str, Any]) -> None:
    SCHEMA.validate(usual)
    policy = read(tmp_path, usual)
    (duty,) = policy.duties
    assert duty.steering.modes == {"weapons": "stop", "shock": "steer"}
    assert duty.steering.strengths == {"weapons": 2.0, "shock": 1.0}
    assert policy.strictness(["weapons"]) == "warn" and policy.strictness(duty.steering.domains) == "block"
    assert policy.key == b"k" * 32


WRONG: dict[str, dict[str, Any]] = {
    "a key too many": {"dictionary": "flux.safetensors"},
    "another format": {"format": 2},
    "a number for a list": {"dictionaries": 1},
    "a hash that is none": {"dictionaries": [{"file": "flux.safetensors", "sha256": "0" * 63}]},
    "a file without a name": {"dictionaries": [{"file": "", "sha256": "0" * 64}]},
    "a domain's name that is none": {"domains": {"Weapons": {}}},
    "an action that is none": {"domains": {"weapons": {"action": "off"}}},
    "a policy that is none": {"domains": {"weapons": {"policy": "off"}}},
    "no strength": {"domains": {"weapons": {"strength": 0}}},
    "too much strength": {"domains": {"weapons": {"strength": 11}}},
    "a rule's key too many": {"domains": {"weapons": {"gate": False}}},
    "a log without a name": {"audit": {"file": ""}},
    "a log of no size": {"audit": {"file": "audit.jsonl", "megabytes": 0}},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_reader_and_schema_refuse_the_same(tmp_path: Path, usual: dict[str, Any], change: dict) -> None:
    assert not SCHEMA.is_valid(usual | change)
    with pytest.raises(PolicyError, match=re.escape(str(tmp_path / "policy.json"))):
        read(tmp_path, usual | change)


def test_the_example_in_docs_fits_the_schema() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", (DOCS / "policy.md").read_text(), re.DOTALL)
    SCHEMA.validate(json.loads(example))


LESS: dict[str, dict[str, Any]] = {
    "strength": {"strength": 1.5},
    "action": {"modes": {"weapons": "steer"}},
    "the other action": {"modes": {"weapons": "stop", "shock": "observe"}},
    "plan": {"plan": []},
    "length kept": {"preserve_norm": True},
}


@pytest.mark.parametrize("options", LESS.values(), ids=LESS)
def test_a_workflow_that_does_less_does_not_meet_it(
    tmp_path: Path, usual: dict[str, Any], options: dict
) -> None:
    policy = read(tmp_path, usual)
    (duty,) = policy.duties
    dictionary = duty.steering.dictionary
    enough = {"modes": {"weapons": "stop"}, "strength": 2.0}
    assert policy.is_met(duty, Steering(dictionary, **enough), [])
    assert not policy.is_met(duty, Steering(dictionary, **enough | options), [])
