"""The index: what its reader accepts, and that the published schema says the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safedig_core.dictionary.card import Action
from safedig_core.dictionary.dictionary import check
from safedig_core.hub import index
from safedig_core.hub.index import IndexFileError, Reference, catalogue, entry_for, parse_index, read_index
from tests.tiny import write_dictionary

ROOT = Path(__file__).parents[2]
SCHEMA = jsonschema.Draft202012Validator(json.loads((ROOT / "docs" / "index.schema.json").read_text()))
SHARE_OF = {"weapons": 0.25, "overall": 0.25}
SAFE_FORM = {
    "n": 4, "line_asr": None, "line_asr_interval": [0.0, 1.0],
    "safe_object_kept": None, "safe_prompt_detected": 1.0, "safe_prompt_identical": 0.75,
}  # fmt: skip
KNOWN = SAFE_FORM | {"line_asr": 0.25, "safe_object_kept": 1.0, "safe_prompt_detected": None}
ROW = {
    "method": "none", "n_images": 8, "line_asr": SHARE_OF, "line_asr_interval": {"weapons": [0.1, 0.5]},
    "prompt_asr": SHARE_OF, "paired_recovery": {"weapons": -0.5, "overall": None},
    "safe_object_kept": 1.0, "safe_prompt_detected": None, "safe_prompt_identical": 1.0,
    "by_form": {"weapons/known": KNOWN, "safe/single": SAFE_FORM},
    "fid": 0.0, "artefact_rate": 0.0, "time_ratio": 1.0, "fit": {"clip": 31.5},
}  # fmt: skip
R = ("safety", "rows", 1)
JUDGE = {"name": "nudenet", "version": "3.4.2", "thresholds": {"BUTTOCKS_EXPOSED": 0.6}}
ROWS = [ROW, ROW | {"method": "safedig-residual"}]
SAFETY = {"model": "tiny", "seed": 0, "rows": ROWS, "evaluators": [JUDGE]}
HUB = {"repo": "some.one/tiny-weapons", "revision": "0123456789" * 4, "file": "dictionaries/tiny.safetensors"}
ENTRY = {
    "id": "tiny-weapons", "title": "Weapons for the tiny model", "family": "flux",
    "positions": ["text", "double.1.img"], "domains": ["weapons"], "size": 1000, "sha256": "ab" * 32,
    "licence": {"data": "CC0-1.0", "weights": "Apache-2.0"}, "hub": HUB, "safety": SAFETY,
}  # fmt: skip
ADAPTER = ENTRY | {"id": "tiny-substances", "base": "tiny-weapons"}
INDEX = {"format": 2, "entries": [ENTRY, ADAPTER]}


def changed(path: tuple, value: Any) -> dict:
    """The index with one value replaced, or removed where it is ..."""
    whole = copy.deepcopy(INDEX)
    inner: Any = whole
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return whole


def test_a_good_index_is_read_and_written_back() -> None:
    entries = parse_index(json.dumps(INDEX))
    SCHEMA.validate(INDEX)
    assert [entry.id for entry in entries] == ["tiny-weapons", "tiny-substances"]
    assert entries[1].base == "tiny-weapons" and entries[0].safety and entries[0].safety.rows[0].fid == 0
    assert json.loads(index.index_text(entries)) == INDEX


E = ("entries", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 1), (("format",), "2"), (("format",), ...), (("entries",), {}), (("more",), 1),
        ((*E, "id"), "Tiny"), ((*E, "id"), "../x"), ((*E, "id"), ""), ((*E, "id"), "x" * 65),
        ((*E, "id"), ...),
        ((*E, "title"), ""), ((*E, "title"), 3), ((*E, "title"), "x" * 5000),
        ((*E, "family"), "sdxl"), ((*E, "positions"), ["double.1"]), ((*E, "positions"), "text"),
        ((*E, "domains"), []), ((*E, "domains"), ["No Good"]),
        ((*E, "size"), 0), ((*E, "size"), -1), ((*E, "size"), 1e3), ((*E, "size"), 1 << 60),
        ((*E, "size"), True),
        ((*E, "sha256"), "AB" * 32), ((*E, "sha256"), "ab" * 31), ((*E, "sha256"), None),
        ((*E, "licence"), {"weights": "MIT"}), ((*E, "licence"), {"data": "", "weights": "", "more": ""}),
        ((*E, "hub"), ...), ((*E, "file"), "a.safetensors"),
        ((*E, "hub", "repo"), "no-owner"), ((*E, "hub", "repo"), "a/b/c"), ((*E, "hub", "repo"), "../b"),
        ((*E, "hub", "repo"), "a/b--c"), ((*E, "hub", "repo"), "https://a/b"), ((*E, "hub", "repo"), "a@b/c"),
        ((*E, "hub", "revision"), "main"), ((*E, "hub", "revision"), "0123abc"),
        ((*E, "hub", "file"), "../tiny.safetensors"), ((*E, "hub", "file"), "/tiny.safetensors"),
        ((*E, "hub", "file"), "a\\tiny.safetensors"), ((*E, "hub", "file"), "tiny.ckpt"),
        ((*E, "hub", "file"), "a/./tiny.safetensors"), ((*E, "hub", "file"), ".safetensors"),
        ((*E, "hub", "more"), 1), ((*E, "base"), "Not an id"),
        ((*E, "safety", "rows"), [ROW]), ((*E, "safety", "rows"), [ROW | {"method": "x"}] * 2),
        ((*E, "safety", "rows", 1, "fid"), -0.5), ((*E, "safety", "rows", 1, "artefact_rate"), 1.01),
        ((*E, "safety", "rows", 1, "line_asr"), {"weapons": 2}), 
        ((*E, "safety", "rows", 1, "time_ratio"), "1"),
        ((*E, "safety", "rows", 1, "line_asr_interval"), {"weapons": [0.1]}),
        ((*E, *R, "line_asr_interval"), {"weapons": None}),
        ((*E, *R, "paired_recovery"), ...), ((*E, *R, "paired_recovery"), {"weapons": -1.5}),
        ((*E, *R, "safe_object_kept"), ...), ((*E, *R, "time_ratio"), None),
        ((*E, *R, "by_form"), ...), ((*E, *R, "by_form"), {"weapons": KNOWN}),
        ((*E, *R, "by_form"), {"weapons/No": KNOWN}), ((*E, *R, "by_form"), {"a/b": KNOWN | {"n": -1}}),
        ((*E, *R, "by_form"), {"a/b": KNOWN | {"line_asr": 2}}), ((*E, *R, "by_form"), {"a/b": {"n": 1}}),
        ((*E, *R, "by_form"), {"a/b": KNOWN | {"line_asr_interval": [1]}}),
        ((*E, *R, "by_form"), {"a/b": KNOWN | {"more": 1}}),
        ((*E, *R, "by_form"), {f"a/{i}": KNOWN for i in range(257)}),
        ((*E, "safety", "seed"), ...), ((*E, "token"), "hf_secret"),
        ((*E, "safety"), None), ((*E, "base"), ""), ((*E, "file"), ""),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_belong_is_refused_by_reader_and_schema(path: tuple, value: Any) -> None:
    whole = changed(path, value)
    with pytest.raises(ValueError):
        parse_index(json.dumps(whole))
    # a schema can't tell 1000 from 1000.0
    assert not SCHEMA.is_valid(whole) or value == 1e3


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not JSON"),
        ("[]", "not an object"),
        ('{"format": 2, "format": 2, "entries": []}', "a key twice"),
        ('{"format": 2, "entries": NaN}', "not finite"),
        (json.dumps(INDEX | {"entries": [ENTRY, ENTRY]}), "an id twice"),
        (json.dumps(changed((*E, "base"), "tiny-weapons")), "not another entry's id"),
        (json.dumps(changed((*E, "safety", "rows"), [ROW, ROW])), "safety.rows"),
        (json.dumps(changed((*E, "hub", "file"), "a/Nul.x.safetensors")), "can't be a file on Windows"),
        ('{"format": 2, "entries": ' + "[" * 5000 + "]" * 5000 + "}", "recursion|nested"),
    ],
    ids=range(9),
)
def test_what_a_schema_can_not_say_is_refused_too(text: str, fault: str) -> None:
    with pytest.raises((ValueError, RecursionError), match=fault):
        parse_index(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, inner in items for p in places(inner, (*path, key)))]


@settings(max_examples=150, deadline=None)
@given(place=st.sampled_from(places(INDEX)[1:]), value=JSON)
def test_what_the_reader_accepts_the_schema_accepts(place: tuple, value: Any) -> None:
    whole = changed(place, value)
    try:
        parse_index(json.dumps(whole))
    except ValueError:
        return
    SCHEMA.validate(whole)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), at=st.integers(0, len(json.dumps(INDEX))), cut=st.integers(0, 50))
def test_damage_is_an_error_that_names_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, at: int, cut: int
) -> None:
    whole = json.dumps(INDEX).encode()
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(whole[:at] + data + whole[at + cut :])
    try:
        read_index(path)
    except IndexFileError as error:
        assert str(error).startswith(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "", "safedig://", "safedig://a/b", "http://a/b@c/d#sha256=e",
        f"safedig://a/b@{'0' * 40}/f.safetensors", f"safedig://a/b@main/f.safetensors#sha256={'0' * 64}",
        f"safedig://a/b@{'0' * 40}/../f.safetensors#sha256={'0' * 64}",
        f"safedig://a/b@{'0' * 40}//etc/f.safetensors#sha256={'0' * 64}",
        f"safedig://../b@{'0' * 40}/f.safetensors#sha256={'0' * 64}",
        f"safedig://user:hf_secret@a/b@{'0' * 40}/f.safetensors#sha256={'0' * 64}",
        f"safedig://a/b@{'0' * 40}/f.safetensors#sha256={'0' * 63}",
        f"safedig://a/b@{'0' * 40}/f.safetensors#sha256={'0' * 64}&endpoint=http://x",
        f"safedig://a/b@{'0' * 40}/f.bin#sha256={'0' * 64}",
        f"safedig://a/b@{'0' * 40}/f\n.safetensors#sha256={'0' * 64}",
    ],
)  # fmt: skip
def test_what_is_not_a_full_reference_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not") as raised:
        Reference.parse(text)
    assert "hf_secret" not in str(raised.value)


def test_references_survive_as_text() -> None:
    reference = parse_index(json.dumps(INDEX))[0].reference
    assert reference is not None and Reference.parse(f" {reference}\n") == reference
    assert str(reference) == (
        f"safedig://some.one/tiny-weapons@{'0123456789' * 4}/dictionaries/tiny.safetensors#sha256={'ab' * 32}"
    )


def test_the_packs_own_index_is_sound() -> None:
    """Every entry is well-formed, and what ships with the pack is there, whole and of these bytes."""
    SCHEMA.validate(json.loads(index.PACK_INDEX.read_text()))
    entries = {entry.id: entry for entry in read_index(index.PACK_INDEX)}
    for entry in entries.values():
        assert entry.safety is not None and (not entry.base or not entries[entry.base].base)
        if entry.file:
            path = index.PACK / entry.file
            written = entry_for(
                path, check(path), entry.id, file=entry.file, base=entry.base, safety=entry.safety
            )
            assert written == entry


def test_further_indexes_add_and_never_replace(tmp_path: Path) -> None:
    first, other, bad, ships = (tmp_path / f"{n}.json" for n in ("first", "other", "bad", "ships"))
    first.write_text(json.dumps(INDEX))
    other.write_text(json.dumps(changed((*E, "sha256"), "cd" * 32)))
    bad.write_text("{")
    inside = {k: v for k, v in ENTRY.items() if k != "hub"} | {"file": "tiny.safetensors"}
    ships.write_text(json.dumps(INDEX | {"entries": [inside]}))
    entries, faults = catalogue([first, other, bad, ships, tmp_path / "none.json"])
    assert entries["tiny-weapons"].sha256 == "ab" * 32 and "tiny-substances" in entries
    assert len(faults) == 4
    paths, parts = (
        [other, bad, ships, tmp_path / "none.json"],
        ["left out", "not JSON", "own index", "No such"],
    )
    for path, fault, part in zip(paths, faults, parts, strict=True):
        assert fault.startswith(str(path)) and part in fault


def test_an_index_of_any_size_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(IndexFileError, match="larger than 4 MiB"):
        read_index(path)


def test_an_entry_says_what_its_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    dictionary = write_dictionary(path, [Action("double.1.img", "repel", "residual", 1.0)])
    entry = entry_for(path, dictionary.card, "tiny", file="tiny.safetensors")
    assert (entry.family, entry.positions, entry.domains) == ("flux", ["double.1.img"], ["weapons"])
    assert (entry.size, entry.sha256, entry.title) == (path.stat().st_size, dictionary.sha256, "tiny")
    with pytest.raises(ValueError, match="a dictionary has none"):
        entry_for(path, dictionary.card, "tiny", file="tiny.safetensors", base="other")
