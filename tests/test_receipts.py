"""Receipts in saved pictures: of these pixels, and signed, or not believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from safedig_core.cli.parser import main
from safedig_core.signing import sign

KEY = b"k" * 32


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., list[str]]:
    """Saves a picture as Save Image does, and gives the arguments that check it."""
    (tmp_path / "key").write_bytes(KEY)

    def write(colour: str = "red", said: Any = None, text: str | None = None) -> list[str]:
        info = PngInfo()
        if said is not None or text is not None:
            info.add_text("safedig", json.dumps(said) if text is None else text)
        path = tmp_path / "picture.png"
        Image.new("RGB", (6, 4), colour).save(path, pnginfo=info)
        return ["verify", str(path), "--key", str(tmp_path / "key")]

    return write


def receipt(colour: str = "red", **changed: Any) -> dict[str, Any]:
    pixels = hashlib.sha256(Image.new("RGB", (6, 4), colour).tobytes()).hexdigest()
    said = {"verdict": "weapons steered", "as_planned": True, "evidence": 0.1234567890123}
    return said | {"pictures": [{"sha256": pixels}]} | changed


def test_a_signed_receipt_of_these_pixels_is_believed(
    save: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = save(said={"7": [sign(receipt("blue"), KEY), sign(receipt(), KEY)]})
    assert main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    assert "node 7: weapons steered (signed)" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "out.json").read_text())["receipts"]
    assert found["signed"] and found["receipt"]["evidence"] == 0.1234567890123


def test_one_that_says_not_as_planned_has_a_code_of_its_own(save: Any) -> None:
    assert main(save(said={"7": [sign(receipt(as_planned=False, verdict="not steered"), KEY)]})) == 3


def test_without_a_key_it_is_not_believed(save: Any, capsys: pytest.CaptureFixture) -> None:
    assert main(save(said={"7": [receipt()]})[:2]) == 4
    assert "signature not checked" in capsys.readouterr().out


DOUBTFUL: dict[str, tuple[dict[str, Any], str]] = {
    "no receipt": ({}, "carries no receipt"),
    "of other pixels": ({"said": {"7": [sign(receipt("blue"), KEY)]}}, "none of its receipts"),
    "not signed": ({"said": {"7": [receipt()]}}, "not signed"),
    "of another key": ({"said": {"7": [sign(receipt(), b"l" * 32)]}}, "not signed"),
    "changed afterwards": ({"said": {"7": [sign(receipt(), KEY) | {"verdict": "clear"}]}}, "not signed"),
    "pixels exchanged": (
        {"said": {"7": [sign(receipt("blue"), KEY) | {"pictures": receipt()["pictures"]}]}},
        "not signed",
    ),
    "signed and not": ({"said": {"7": [sign(receipt(), KEY)], "8": [receipt()]}}, "not signed"),
    "a signature that is no text": ({"said": {"7": [receipt(signature=7)]}}, "not signed"),
    "no JSON": ({"text": "{"}, "not JSON"),
    "nested deeply": ({"text": "[" * 100_000}, "not JSON"),
    "other JSON": ({"said": {"7": [{"pictures": {"sha256": 1}}, 3], "8": 4}}, "none of its receipts"),
}


@pytest.mark.parametrize(("given", "why"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_all_else_is_refused_in_one_line(
    save: Any, given: dict[str, Any], why: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(save(**given)) == 1
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(20)], ids=["empty", "cut", "gif"]
)
def test_what_is_no_picture_is_refused(save: Any, content: bytes, capsys: pytest.CaptureFixture) -> None:
    arguments = save()
    Path(arguments[1]).write_bytes(content)
    assert main(arguments) == 1
    assert "no PNG that can be read" in capsys.readouterr().err


def test_a_short_key_is_refused(save: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = save(said={"7": [sign(receipt(), b"")]})
    (tmp_path / "key").write_bytes(b"")
    assert main(arguments) == 1
    assert "shorter than 32 bytes" in capsys.readouterr().err
