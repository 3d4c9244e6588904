"""What the stand-in answers is what this pack's nodes are now; else: python -m tests.web.record."""

from __future__ import annotations

import json
from pathlib import Path

from tests.nodes.test_definitions import SNAPSHOT, essence

HERE = Path(__file__).parent


def test_the_recorded_nodes_are_the_packs() -> None:
    recorded = json.loads((HERE / "object_info.json").read_text("utf-8"))
    ours = {name: essence(d) for name, d in recorded.items() if name.startswith("SafeDIG")}
    assert ours == json.loads(SNAPSHOT.read_text("utf-8"))
