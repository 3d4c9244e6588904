"""The benchmark at a tiny size: its JSON is that of DESIGN section 6, and its ratios are what they say."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from safedig_core.bench import bench
from safedig_core.bench.bench import Scale
from safedig_core.bench.instruments import in_own_process, memory_mb
from safedig_core.cli import parser as cli

TINY_SCALE = Scale(("sd3.5-medium",), 4, 8, 8, 256, 4, 8, 1, 2)

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


def test_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "in_own_process", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(bench, "Scale", lambda families: replace(TINY_SCALE, families=families))
    assert cli.main(["bench", "--families", "sd3.5-medium", "--json", str(tmp_path / "b.json")]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert found.keys() == {"steering", "full_size", "dictionary", "capture", "training", "environment"}
    assert [(r["operator"], r["form"]) for r in found["steering"]] == [
        ("repel", "residual"), ("blend", "residual"), ("repel", "paper"), ("blend", "paper")
    ]  # fmt: skip
    for row in found["steering"]:
        assert list(row) == ["family", "operator", "form", "positions", "time_ratio", "naive_time_ratio"]
        assert row["family"] == "sd3.5-medium" and row["positions"] == 3
        assert row["time_ratio"] > 1 and row["naive_time_ratio"] > 1
    (full,) = found["full_size"]
    blocks = sum(full["blocks"][name] * seconds for name, seconds in full["block_s"].items())
    assert full["forward_s"] == pytest.approx(full["rest_s"] + blocks) and sum(full["blocks"].values()) == 24
    assert full["tokens"] == {"text": 8, "joint.0.img": 16, "joint.2.img": 16}
    d = found["dictionary"]
    assert d.keys() >= {"open_s", "resident_mb", "eager_open_s", "eager_resident_mb"}
    assert d["open_s"] > 0 and d["eager_open_s"] > 0 and d["file_mb"] > 0
    assert -0.5 < found["capture"]["overhead"] < 5
    assert found["training"] == []
    assert "sd3.5-medium   repel  residual  at 3 positions" in capsys.readouterr().out


def test_an_unknown_family_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--families", "flux2"]) == 1
    assert "unknown family 'flux2': expected flux1-dev, sd3.5-medium, sd3.5-large" in capsys.readouterr().err


def test_a_section_has_a_process_and_memory_of_its_own() -> None:
    ballast = bytearray(300 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    here = memory_mb("VmRSS")
    assert in_own_process(os.getpid) != os.getpid()
    assert here - in_own_process(memory_mb, "VmHWM") > 200
