"""The example workflows, which ComfyUI shows as templates, by the number that their name begins with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATHS = sorted((Path(__file__).parents[1] / "example_workflows").glob("*.json"))


def path(number: int) -> Path:
    (found,) = [each for each in PATHS if each.stem.startswith(f"{number} ")]
    return found


def workflow(number: int) -> dict[str, Any]:
    return json.loads(path(number).read_text(encoding="utf-8"))
