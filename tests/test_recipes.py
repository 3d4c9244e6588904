"""docs/recipes.md: its commands are understood, its positions exist, its figure is what it prints."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from safedig_core.cli.parser import parser
from safedig_core.positions import Architecture
from safedig_core.prompts import read_prompts
from tests import templates

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)
MODELS = {
    "FLUX.1-dev": Architecture("flux", (19, 38), 3072, 4096, 768),
    "stable-diffusion-3.5-large": Architecture("sd3", (38, 0), 2432, 4096, 2048),
}
MAKERS = {"FLUX.1-dev": 5, "stable-diffusion-3.5-large": 7}  # templates


def variables(model: str) -> dict[str, str]:
    """What the recipe sets before its commands, for one of its models."""
    (block,) = [b for b in BLOCKS if b.startswith("M=") and model in b]
    licences = [line for b in BLOCKS for line in b.splitlines() if line.startswith("LICENCES=")]
    lines = [*block.splitlines(), *licences]
    return {name: shlex.split(value)[0] for name, value in (line.split("=", 1) for line in lines)}


@pytest.mark.parametrize("model", MODELS)
def test_commands_are_understood(model: str) -> None:
    block = next(b for b in BLOCKS if "safedig_core capture" in b).replace("\\\n", " ")
    for name, value in variables(model).items():
        block = block.replace(f"${name}", value)
    commands = [line for line in block.splitlines() if line.startswith("python -m safedig_core")]
    parsed = [parser().parse_args(shlex.split(command)[3:]) for command in commands]
    assert [o.command for o in parsed] == ["capture", "route", "train", "adapt", "check"]
    publish = [line for b in BLOCKS for line in b.splitlines() if "safedig_core publish" in line]
    uploads = [parser().parse_args(shlex.split(line, comments=True)[3:]).upload for line in publish]
    assert uploads == [False, True]
    options = parsed[0]
    architecture = MODELS[model]
    assert {architecture.group(p) for p in options.positions} == {"text", "bind", "render"}
    for position in options.positions:
        architecture.require(position)
    nodes = templates.workflow(MAKERS[model])["nodes"]
    (capture,) = [n["widgets_values"] for n in nodes if n["type"] == "SafeDIGCaptureActivations"]
    assert capture[1].split(", ") == options.positions
    assert capture[2:4] == [options.steps, options.tokens]
    table = "".join(f"`{position}`, " for position in options.positions).rstrip(", ")
    assert table in TEXT


def test_the_split_and_the_estimate(tmp_path: Path) -> None:
    split = next(b for b in BLOCKS if b.startswith("P="))
    split = split.replace("P=safedig_core", f"P={shlex.quote(str(ROOT))}/safedig_core")
    subprocess.run(["bash", "-ec", split], cwd=tmp_path, check=True)
    train, tune = (read_prompts(tmp_path / f"{name}.jsonl") for name in ("train", "tune"))
    assert not {p.safe for p in train} & {p.safe for p in tune}
    assert [sum(p.domain == d for p in train) for d in ("violence", "shocking", "safe")] == [48, 48, 60]
    assert [sum(p.domain == d for p in tune) for d in ("violence", "shocking", "safe")] == [16, 16, 100]
    (script,) = [b for b in BLOCKS if b.startswith("python - <<'END'\n")]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + script.split("\n", 1)[1].removesuffix("END\n")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    figures = run.stdout.split("\n")[:2]
    assert f"prints {figures[0]} and {figures[1]}" in TEXT
    assert all(TEXT.count(figure) >= 2 for figure in figures)  # in the table too
