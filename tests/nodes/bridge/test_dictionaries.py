"""What the loader offers and what a saved value means, without ComfyUI and without the network."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from safedig_core.dictionary.card import Action
from tests.hub import test_index
from tests.nodes.conftest import pack_module
from tests.tiny import write_dictionary

sources = pack_module("nodes.bridge.dictionaries")
index = pack_module("safedig_core.hub.index")
REFERENCE = (
    f"safedig://some.one/tiny-weapons@{'0123456789' * 4}/dictionaries/tiny.safetensors#sha256={'ab' * 32}"
)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """models/safedig with a dictionary, a download and an index; a pack with one dictionary of its own."""
    folder = tmp_path / "models" / "safedig"
    (folder / "hub").mkdir(parents=True)
    plan = [Action("double.1.img", "repel", "residual", 1.0)]
    write_dictionary(folder / "mine.safetensors", plan)
    (folder / "hub" / "other.0123.safetensors").write_bytes(b"x")
    (folder / "further.json").write_text(json.dumps(test_index.INDEX))

    pack = tmp_path / "pack"
    pack.mkdir()
    made = write_dictionary(pack / "own.safetensors", plan)
    entry = index.entry_for(made.path, made.card, "own-one", file="own.safetensors")
    (pack / "index.json").write_text(index.index_text([entry]))
    for module in (index, sources):
        monkeypatch.setattr(module, "PACK_INDEX", pack / "index.json")
    for module in (sources, sources.hub):
        monkeypatch.setattr(module, "PACK", pack)

    fake: Any = ModuleType("folder_paths")
    fake.models_dir = str(tmp_path / "models")
    fake.get_folder_paths = lambda kind: [str(folder)]
    fake.get_output_directory = lambda: str(tmp_path / "output")
    monkeypatch.setitem(sys.modules, "folder_paths", fake)
    return folder


@pytest.fixture(autouse=True)
def no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is shown or looked up here, the Hub's client must not be needed."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


def test_one_list_of_all_and_its_values_do_not_change(models: Path) -> None:
    before = sources.choices()
    assert before == [
        "mine.safetensors", "own-one (bundled)", "tiny-weapons (hub)", "tiny-substances (hub)",
    ]  # fmt: skip
    lines = [sources.listed(name, sources.find(name)) for name in before]
    assert [line["state"] for line in lines] == ["local", "bundled", "not downloaded", "not downloaded"]
    assert [line["size"] for line in lines][2:] == [1000, 1000] and lines[2]["reference"] == REFERENCE
    (models / "hub" / f"tiny.{'ab' * 8}.safetensors").write_bytes(b"x")
    assert sources.choices() == before
    assert sources.listed(before[2], sources.find(before[2]))["state"] == "downloaded"


def test_the_list_reads_each_index_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [test_index.ENTRY | {"id": f"tiny-{i}", "sha256": f"{i:064x}"} for i in range(100)]
    (models / "further.json").write_text(json.dumps(test_index.INDEX | {"entries": entries}))
    read: list[str] = []

    def counted(path: Path) -> list:
        read.append(path.name)
        return whole(path)

    whole = index.read_index
    monkeypatch.setattr(index, "read_index", counted)
    assert len(sources.lines()) == 102 and sorted(read) == ["further.json", "index.json"]
    sources.shown("tiny-7 (hub)")
    assert len(read) == 2
    (models / "further.json").write_text(json.dumps(test_index.INDEX))
    assert [line["name"] for line in sources.lines()][2:] == ["tiny-weapons (hub)", "tiny-substances (hub)"]
    assert len(read) == 4


def test_what_is_no_file_of_its_own_is_neither_listed_nor_opened(models: Path, tmp_path: Path) -> None:
    before = sources.lines()
    (tmp_path / "outside").mkdir()
    outside = tmp_path / "outside" / "theirs.safetensors"
    outside.write_bytes((models / "mine.safetensors").read_bytes())
    (models / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    (models / "link.safetensors").symlink_to(outside)
    (models / "zero.safetensors").symlink_to("/dev/zero")
    (models / "folder").symlink_to(outside.parent)
    (models / "loop").symlink_to(models)
    (models / "folder.safetensors").mkdir()
    os.mkfifo(models / "pipe.safetensors")
    os.mkfifo(models / "pipe.json")
    (models / "dangling.json").symlink_to(tmp_path / "nowhere")
    for name in ("NUL.safetensors", "com1.x.safetensors", ".hidden.safetensors", "a\u202eb.safetensors"):
        (models / name).write_bytes(outside.read_bytes())
    (models / ".mine.safetensors.01234567.part").mkdir()
    (models / ".mine.safetensors.01234567.part" / "mine.safetensors").write_bytes(b"x")
    assert sources.lines() == before
    for path in (*models.glob("*"), models / "folder" / outside.name, models / "loop" / "mine.safetensors"):
        if (path.suffix == ".safetensors" and path.name != "mine.safetensors") or path.parent != models:
            shown = sources.shown(str(path.relative_to(models)))
            assert shown["error"].startswith("There is no dictionary"), path


def test_of_what_can_not_be_read_only_that_is_missing(models: Path) -> None:
    (models / "sub").mkdir()
    (models / "sub" / "empty.safetensors").write_bytes(b"")
    (models / "broken.json").write_text("{")
    names = [line["name"] for line in sources.lines()]
    assert names == [
        "mine.safetensors", str(Path("sub/empty.safetensors")), "own-one (bundled)", "tiny-weapons (hub)",
        "tiny-substances (hub)",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["cut.safetensors", "own-one (bundled)", "gone"])
def test_errors_are_told_without_the_servers_folders(models: Path, name: str) -> None:
    (models / "cut.safetensors").write_bytes(b"x" * 100)
    (models / "broken.json").write_text("{")
    own = sources.PACK / "own.safetensors"
    own.write_bytes(own.read_bytes()[:-1])
    told = sources.shown(name)["error"]
    assert str(models.parent.parent) not in told
    what = {"cut.safetensors": "cut", "own-one (bundled)": "own", "gone": "broken"}[name]
    assert re.search(rf"^{what}\.(json|safetensors): ", told, re.MULTILINE)


def test_files_are_read_beside_the_event_loop(models: Path) -> None:
    async def ask() -> list:
        reading = asyncio.gather(
            *(sources._read(work) for work in (wait, threading.get_ident, sources.lines))
        )
        await asyncio.sleep(0)
        go_on.set()  # a server whose loop waited for the first would never get here
        return (await reading)[1:]

    def wait() -> None:
        assert go_on.wait(60)

    go_on = threading.Event()
    thread, lines = asyncio.run(ask())
    assert thread != threading.get_ident() and lines == sources.lines()


def test_a_reference_decides(models: Path) -> None:
    for name in ("mine.safetensors", "not here", sources.NONE_YET):
        assert str(sources.find(name, f" {REFERENCE} ")) == REFERENCE
    assert sources.find("mine.safetensors", " ") == models / "mine.safetensors"
    assert sources.find("own-one (hub)").id == sources.find("own-one").id == "own-one"


@pytest.mark.parametrize(
    ("name", "reference", "message"),
    [
        (
            "gone.safetensors",
            "",
            "There is no dictionary 'gone.safetensors' .* paste its safedig:// reference",
        ),
        ("../mine.safetensors", "", "There is no dictionary"),
        ("gone (hub)", "", "There is no dictionary"),
        (sources.NONE_YET, "", "put .safetensors files"),
        ("mine.safetensors", "some-one/tiny", "is a repository, which may change.* pull some-one/tiny"),
        (
            "mine.safetensors",
            "https://huggingface.co/some-one/tiny",
            "is not a reference: expected safedig://",
        ),
        ("mine.safetensors", REFERENCE[:-1], "is not a SHA-256"),
    ],
)
def test_what_cannot_be_found_is_told_in_words(models: Path, name: str, reference: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources.find(name, reference)


def test_a_broken_index_does_not_hide_the_rest_and_is_named(models: Path) -> None:
    (models / "broken.json").write_text("{")
    assert "tiny-weapons (hub)" in sources.choices()
    with pytest.raises(ValueError, match=r"no dictionary 'gone'[\s\S]*broken\.json: .* not JSON"):
        sources.find("gone")


def test_what_is_shown_before_and_after_a_download(models: Path) -> None:
    for source in (sources.find("tiny-weapons (hub)"), sources.find("", REFERENCE)):
        shown = sources.summary(source)
        assert shown["state"] == "not downloaded" and shown["size"] == 1000
        assert shown["title"] == "Weapons for the tiny model" and shown["domains"] == ["weapons"]
        assert shown["measured"] == "unsafe pictures on tiny: 25.0% without, 25.0% with it"
        assert "plan" not in shown
    shown = sources.summary(sources.find("own-one (bundled)"))
    assert shown["state"] == "bundled" and shown["plan"] == [["double.1.img", "repel", 1.0]]
    assert shown["measured"] == "not measured"
    assert sources.summary(sources.find("tiny-substances"))["base"] == "tiny-weapons"
    unknown = sources.summary(sources.find("", REFERENCE.replace("ab", "cd")))
    assert unknown["title"] == "dictionaries/tiny.safetensors" and unknown["size"] is None
    assert sources.summary(sources.find("mine.safetensors"))["state"] == "local"
    (models / "mine.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"mine\.safetensors: "):
        sources.summary(sources.find("mine.safetensors"))


def test_files_of_the_pack_are_held_to_their_hash(models: Path) -> None:
    source = sources.find("own-one (bundled)")
    path = sources.hub.file_of(source, models / "hub")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="changed since SafeDIG was installed. Install SafeDIG again"):
        sources.hub.file_of(source, models / "hub")
