"""Reports of full-size pictures: nothing sharp can be seen, or found on the disk, unless it was asked for."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
from safedig_core.sheets import KEY, blurred, png, write_report

LINES = torch.zeros(1, 3, 64, 64)
LINES[..., ::2] = 1.0  # what a blur leaves nothing of


def report(out: Path, unblurred: bool) -> str:
    columns = {"none": LINES, "steered": 1 - LINES}
    write_report(out, "title", "lead", ["<table></table>"], columns, ["a <b> & c"], unblurred)
    return (out / "report.html").read_text()


def test_pictures_are_blurred_and_come_back_one_by_one(tmp_path: Path) -> None:
    text, sharp = report(tmp_path, False), png(LINES[0])
    assert base64.b64encode(sharp).decode() not in text
    files = sorted((tmp_path / "pictures").iterdir())
    assert [file.name for file in files] == ["000-none.png", "000-steered.png"]
    assert all(file.read_bytes() not in (sharp, png(1 - LINES[0])) for file in files)
    scrambled = [base64.b64decode(found) for found in re.findall(r'data-sharp="([^"]+)"', text)]
    assert len(scrambled) == 2 and bytes(byte ^ KEY for byte in scrambled[0]) == sharp
    assert b"PNG" not in b"".join(scrambled) and "a &lt;b&gt; &amp; c" in text


def test_unblurred_is_as_asked_for(tmp_path: Path) -> None:
    text = report(tmp_path, True)
    assert base64.b64encode(png(LINES[0])).decode() in text and "data-sharp=" not in text
    assert (tmp_path / "pictures" / "000-none.png").read_bytes() == png(LINES[0])


def test_a_blur_leaves_no_detail() -> None:
    assert blurred(LINES).std() < 0.01 and blurred(LINES).shape == LINES.shape
