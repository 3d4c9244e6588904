"""Node texts and the views' texts in every language: no key is missing, none is left over."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LOCALES = ROOT / "locales"
TRANSLATED = ("de", "es", "fr", "ja", "ko", "zh")  # English nodes are in the schemas
NODES: dict[str, dict] = json.loads((Path(__file__).parent / "definitions.json").read_text("utf-8"))
PLACES = re.compile(r"\{\w+\}")


def read(language: str, name: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / f"{name}.json").read_text("utf-8"))


def leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield above + key, value


def test_the_languages() -> None:
    files = {path.relative_to(LOCALES).as_posix() for path in LOCALES.glob("*/*")}
    translated = {f"{language}/{name}.json" for language in TRANSLATED for name in ("main", "nodeDefs")}
    assert files == translated | {"en/main.json"}


@pytest.mark.parametrize("language", TRANSLATED)
def test_nodes_have_all_their_texts(language: str) -> None:
    found = read(language, "nodeDefs")
    assert set(found) == set(NODES)
    for name, definition in NODES.items():
        texts = found[name]
        assert set(texts) == {"display_name", "description", "inputs", "outputs"}
        assert set(texts["inputs"]) == {entry["name"] for entry in definition["inputs"]}, name
        assert list(texts["outputs"]) == [str(i) for i in range(len(definition["outputs"]))], name
    for key, text in leaves(found):
        assert text.strip(), key
        assert not re.search(r"[@{}|]", text), f"{key}: the page would read {text!r} as a formula"


@pytest.mark.parametrize("language", TRANSLATED)
def test_views_have_all_their_texts(language: str) -> None:
    english, found = dict(leaves(read("en", "main"))), dict(leaves(read(language, "main")))
    assert found.keys() == english.keys()
    for key, text in found.items():
        assert text.strip(), key
        assert sorted(PLACES.findall(text)) == sorted(PLACES.findall(english[key])), key


def test_the_views_say_what_there_is() -> None:
    """Keys stand in web/*.js as strings, or as templates that begin with the key's first names."""
    english = dict(leaves(read("en", "main")["safedig"]))
    sections = "|".join({key.split(".")[0] for key in english})
    script = "".join(path.read_text("utf-8") for path in sorted((ROOT / "web").glob("*.js")))
    literal = set(re.findall(rf"[\"']((?:{sections})\.[\w.]+)[\"']", script))
    begun = tuple(re.findall(rf"`((?:{sections})\.[\w.]*)\$\{{", script))
    assert literal <= english.keys()
    assert [key for key in english if key not in literal and not key.startswith(begun)] == []
    assert all(any(key.startswith(beginning) for key in english) for beginning in begun)
