"""Errors as ComfyUI's page shows them: no folders of the server."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safedig_core.dictionary.dictionary import Dictionary, DictionaryError
from tests.nodes.conftest import pack_module

messages = pack_module("nodes.bridge.messages")


@pytest.fixture
def comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "Comfy UI"  # names with spaces can't be told from words
    paths = {
        "get_folder_paths": lambda kind: [str(folder / "models" / kind)],
        "get_output_directory": lambda: str(folder / "output"),
    }
    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace(**paths))
    (folder / "models" / "safedig" / "mine").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("{0}/models/safedig/mine/a b.safetensors: cut", "mine/a b.safetensors: cut"),
        ("{0}/output/safedig/run/store is full", "safedig/run/store is full"),
        ("[Errno 2] No such file: '/root/.cache/hub/x.json'", "[Errno 2] No such file: 'x.json'"),
        (r"C:\Users\me\x.json: cut", "x.json: cut"),
        (r"[Errno 2] No such file: 'C:\\Users\\me\\x.json'", "[Errno 2] No such file: 'x.json'"),
        ("(/srv/a/x.pt, /srv/b/y.pt)", "(x.pt, y.pt)"),
        ("safedig://some.one/tiny@0123/dictionaries/a.safetensors", None),
        ("https://huggingface.co/some-one/tiny: offline", None),
        ("put it into models/safedig, blend and/or repel, 3/4 of it", None),
    ],
)
def test_folders_are_left_out(comfyui: Path, said: str, shown: str | None) -> None:
    assert messages.without_paths(said.format(comfyui)) == (said if shown is None else shown)


def test_a_node_names_the_file_and_the_log_its_folder(
    comfyui: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = comfyui / "models" / "safedig" / "mine" / "broken.safetensors"
    path.write_bytes(b"x" * 100)
    gone = comfyui.with_name("gone")  # no folder that ComfyUI knows

    @messages.told_without_paths
    class Node:
        @classmethod
        def execute(cls, **inputs: Any) -> str:
            if inputs["file"] is None:
                return cls.__name__
            return str(Dictionary.open(path) if inputs["file"] == "broken" else gone.read_text())

    with pytest.raises(DictionaryError) as raw:
        Dictionary.open(path)
    assert str(comfyui) in str(raw.value)
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError) as told:
        Node.execute(file="broken")
    assert str(told.value) == str(raw.value).replace(str(path), "mine/broken.safetensors")
    assert str(raw.value) in caplog.messages
    with pytest.raises(ValueError, match=r"^\[Errno 2\] No such file or directory: 'gone'$"):
        Node.execute(file="gone")
    assert Node.execute(file=None) == "Node"
