"""NOTICE credits the artwork behind each picture and weight, and goes where they go."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTICE = (ROOT / "NOTICE").read_text(encoding="utf-8")
NAMED = re.findall(r"^  ((?:\w+/)+[\w*.-]+)$", NOTICE, re.MULTILINE)
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}


def test_every_picture_and_every_weight_is_named() -> None:
    found = [path for path in (ROOT / "safedig_core" / "pocket").rglob("*.safetensors")]
    for folder in ("docs", "example_workflows", "locales", "nodes", "safedig_core", "tests", "web"):
        found += [p for p in (ROOT / folder).rglob("*") if p.suffix.lower() in PICTURES]
    names = {path.relative_to(ROOT).as_posix() for path in found}
    assert {"docs/pictures/prompts-with-weapons.png", "tests/pocket/hand_check.png"} < names
    assert [name for name in sorted(names) if not any(fnmatch(name, pattern) for pattern in NAMED)] == []


def test_the_credits_are_those_that_the_licences_ask_for() -> None:
    for said in ("Twitter, Inc and other contributors", "https://creativecommons.org/licenses/by/4.0/"):
        assert said in NOTICE
    data = (ROOT / "safedig_core" / "pocket" / "weights" / "README.md").read_text(encoding="utf-8")
    for package in re.findall(r"`(emoji-datasource-\w+)` (\d+\.\d+\.\d+)", data):
        assert " ".join(package) in NOTICE


def test_notice_goes_where_the_pack_goes() -> None:
    """To the Registry goes what .comfyignore does not name."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.strip("/") for line in lines if line and not line.startswith("#")]
    assert fnmatch("Makefile", patterns[patterns.index("Makefile")])  # the patterns are read as meant
    for shipped in ("NOTICE", "LICENSE", "safedig_core/pocket/weights/README.md"):
        assert not any(fnmatch(shipped, p) or shipped.startswith(f"{p}/") for p in patterns), shipped
