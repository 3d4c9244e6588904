"""A real ComfyUI under an operator's policy: hostile workflows, the audit log, signed receipts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safedig_core.cli.parser import main
from tests.hub.hub_server import FakeHub
from tests.nodes.graph_check import Build, Runner, write_files
from tests.nodes.hostile import REFUSED, WORKFLOWS, Workflow
from tests.nodes.server import Result, Server

POLICY = "The operator's policy"
KEY = bytes(range(32))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator's own folder."""
    return tmp_path_factory.mktemp("operator")


@pytest.fixture(scope="module")
def runner(
    comfyui: Path, fake_hub: FakeHub, kept: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runner]:
    """With a policy in its usual place, whose dictionaries find something in everything."""
    base = tmp_path_factory.mktemp("policy")
    folder = base / "models" / "safedig"
    folder.mkdir(parents=True)
    (base / "input").mkdir()
    write_files(base)
    (kept / "key").write_bytes(KEY)
    files = [folder / f"hot-{family}.safetensors" for family in ("flux", "sd3")]
    policy = {
        "format": 1,
        "dictionaries": [
            {"file": f.name, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files
        ],
        "domains": {"weapons": {}},
        "signing_key": str(kept / "key"),
        "audit": {"file": str(kept / "audit.jsonl")},
    }
    (folder / "policy.json").write_text(json.dumps(policy))
    server = Server(comfyui, base, fake_hub.environment())
    try:
        server.wait()
        yield Runner(server)
    finally:
        server.stop()


def run(runner: Runner, workflow: Workflow) -> tuple[Build, Result]:
    runner.count += 1
    build = Build(workflow.family, workflow.given, f"{workflow} {runner.count}")
    workflow.build(build)
    lacking = {node["class_type"] for node in build.nodes.values()} - runner.info.keys()
    if lacking:
        pytest.skip(f"this ComfyUI has no node {', '.join(sorted(lacking))}")
    return build, runner.server.run(runner.complete(build.nodes), {"extra_pnginfo": {}})


def audit(kept: Path, prompt_id: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (kept / "audit.jsonl").read_text().splitlines()]
    return [line for line in lines if line["prompt_id"] == prompt_id]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=str)
def test_no_picture_is_unsteered(runner: Runner, kept: Path, workflow: Workflow) -> None:
    _, result = run(runner, workflow)
    lines = audit(kept, result.prompt_id)
    if workflow.expect == REFUSED:
        assert result.message.startswith(POLICY) and "kept" not in result.outputs
        assert lines and lines[-1]["verdict"] == "refused"
        return
    assert result.error is None, result.message
    assert "kept" in result.outputs
    assert lines and {line["verdict"] for line in lines} == {"weapons steered"}
    seen = runner.server.get(f"/safedig_tests/observed/{result.prompt_id}")
    passes = [each for of_node in seen.values() for each in of_node]
    risky = [(each, i) for each in passes for i, row in enumerate(each["rows"]) if row.startswith("risky")]
    assert risky or workflow.build.__name__ == "compiled"  # whose graph no hook sees
    for each, i in risky:
        moved = [rows[i] for rows in each["reached"].values() if rows is not None]
        assert any(moved), f"a row of the risky prompt went by unmoved: {each}"


def test_the_workflows_are_enough_and_named_once() -> None:
    names = [str(workflow) for workflow in WORKFLOWS]
    assert len(set(names)) == len(names) >= 30


def test_the_server_says_that_the_policy_is_in_force(runner: Runner) -> None:
    text = (runner.server.base / "models" / "safedig" / "policy.json").read_bytes()
    status = runner.server.get("/safedig/policy")
    assert status["policy"] == hashlib.sha256(text).hexdigest()
    assert status["samples"] and status["signs"] and status["audits"]
    assert "policy.json" not in json.dumps(runner.server.get("/safedig/list"))


def test_saved_pictures_carry_signed_receipts(
    runner: Runner, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    build = Build("flux", {}, "signed")
    build.simple()
    result = runner.server.run(runner.complete(build.nodes), {"extra_pnginfo": {}})
    picture = str(runner.server.file(result.outputs["receipt saved"]["images"][0]))
    (tmp_path / "other").write_bytes(b"o" * 32)
    assert main(["verify", picture, "--key", str(kept / "key")]) == 0
    assert "weapons steered (signed)" in capsys.readouterr().out
    assert main(["verify", picture, "--key", str(tmp_path / "other")]) == 1
