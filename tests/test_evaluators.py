"""Evaluators as plug-ins: what they see counts from their thresholds on; a missing one says how to get it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safedig_core.evaluators import EXPOSURE, About, ClipFit, NudeNet, Panel, panel_of

GREY = torch.full((2, 3, 32, 32), 0.5)


class Fixed:
    """Says the same of every picture."""

    def __init__(self, name: str, tells: str, scores: dict[str, float], **thresholds: float):
        self.about, self.tells, self._scores = About(name, "1", thresholds), tells, scores

    def scores(self, images: Tensor, prompts: Sequence[str]) -> list[dict[str, float]]:
        return [self._scores for _ in prompts]


def test_a_picture_is_unsafe_where_any_evaluator_says_so() -> None:
    plugins = [
        Fixed("a", "risk", {"gore": 0.4, "face": 1.0}, gore=0.5),
        Fixed("b", "risk", {"gun": 0.5, "fire": float("nan")}, gun=0.5, fire=0.5),
        Fixed("c", "fit", {"fit": 31.0}),
    ]
    panel = Panel(plugins)
    seen, fit = panel.look(GREY, ["x", "y"])
    assert seen == [{"b: gun", "b: fire"}] * 2  # what is no number is not passed over
    assert fit == [{"c": 31.0}] * 2 and panel.tells_risk
    assert panel.about[0] == {"name": "a", "version": "1", "thresholds": {"gore": 0.5}}
    assert not Panel(plugins[2:]).tells_risk and Panel().look(GREY, ["x", "y"]) == ([set(), set()], [{}, {}])


def test_what_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'q16' is no evaluator: choose from nudenet, clip"):
        panel_of(["q16"])
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ValueError, match="nudenet is not installed .*: pip install nudenet"):
        panel_of(["nudenet"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("clip", "shieldgemma-2", "llavaguard"):
        with pytest.raises(ValueError, match=f"{name} is not installed .*: pip install transformers"):
            panel_of([name])


def test_weights_that_are_not_there_say_how_to_fetch_them(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="the evaluator clip can't be loaded: .* hf download"):
        ClipFit(str(tmp_path))


def test_nudenet_sees_nothing_in_drawings() -> None:
    pytest.importorskip("nudenet", reason="an optional evaluator")
    evaluator = NudeNet()
    tree = torch.ones(3, 320, 320)
    tree[:, 180:300, 150:170] = torch.tensor([0.4, 0.25, 0.1])[:, None, None]
    y, x = torch.meshgrid(torch.arange(320), torch.arange(320), indexing="ij")
    crown = (y - 120) ** 2 + (x - 160) ** 2 < 80**2
    tree[:, crown] = torch.tensor([0.1, 0.6, 0.2])[:, None]
    noise = torch.rand(3, 320, 320, generator=torch.Generator().manual_seed(0))
    panel = Panel([evaluator])
    assert panel.look(torch.stack([tree, noise]), ["a tree", ""])[0] == [set(), set()]
    assert panel.about[0]["version"] and panel.about[0]["thresholds"]["BUTTOCKS_EXPOSED"] == EXPOSURE


def test_clip_says_how_well_each_picture_fits_its_own_prompt(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    from tests.tiny_pipelines import _clip_tokenizer

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 54, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    transformers.CLIPProcessor(images, _clip_tokenizer(77)).save_pretrained(tmp_path)
    evaluator = ClipFit(str(tmp_path))
    pictures = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    both = [s["fit"] for s in evaluator.scores(pictures, ["a cat", "a boat"])]
    alone = [
        evaluator.scores(p[None], [t])[0]["fit"] for p, t in zip(pictures, ["a cat", "a boat"], strict=True)
    ]
    assert both == pytest.approx(alone, abs=1e-3) and both[0] != both[1]
    assert all(-100 <= fit <= 100 for fit in both)
