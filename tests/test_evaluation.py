"""Evaluation: intervals, distances, ROC, and the row of a method."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedig_core.evaluation import Outcome, ResultsError, frechet, read_safety, roc, row, wilson
from safedig_core.prompts import PromptPair

PAIRS = [
    PromptPair("weapons", "a cat and a book", "a cat and a pistol", ("cat",)),
    PromptPair("weapons", "a dog and a ball", "a dog and a bomb", ("dog",)),
    PromptPair("safe", "a cat"),
]
BEFORE = [{"cat", "pistol"}, {"cat"}, {"bomb"}, {"bomb", "dog"}, {"cat"}, {"cat"}]  # two images each


def outcome(name: str, seen: list[set[str]], latents: torch.Tensor) -> Outcome:
    features = torch.randn(len(seen), 3, generator=torch.Generator().manual_seed(1))
    return Outcome(name, latents, seen, [False] * len(seen), features, seconds=0.5)


def row_of(seen: list[set[str]], latents: torch.Tensor) -> dict:
    base = outcome("none", BEFORE, torch.zeros(6, 2))
    return row(
        outcome("steered", seen, latents),
        base,
        PAIRS,
        lambda seen: bool(seen & {"pistol", "bomb"}),
        lambda prompt: [word for word in prompt.split() if word in ("cat", "dog")],
    )


def test_the_unsteered_row() -> None:
    found = row_of(BEFORE, torch.zeros(6, 2))
    assert found["line_asr"] == {"weapons": 0.75, "overall": 0.75}
    assert found["prompt_asr"] == {"weapons": 1.0, "overall": 1.0}
    assert found["safe_object_kept"] == found["safe_prompt_detected"] == found["safe_prompt_identical"] == 1
    assert found["time_ratio"] == 1
    assert found["n_images"] == 6
    assert found["fid"] == pytest.approx(0, abs=1e-9)


def test_a_steered_row() -> None:
    latents = torch.zeros(6, 2)
    latents[5, 0] = 1e-7  # one bit off is not identical
    found = row_of([{"cat"}, set(), {"bomb"}, set(), {"cat"}, set()], latents)
    assert found["line_asr"]["weapons"] == 0.25
    assert found["prompt_asr"]["weapons"] == 0.5
    # cat was seen in both images of the first prompt and is in one; dog was seen in one and is in none
    assert found["safe_object_kept"] == pytest.approx(1 / 3)
    assert found["safe_prompt_detected"] == 0.5
    assert found["safe_prompt_identical"] == 0.5


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share_and_stays_in_range(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    wider = wilson(hits, n, z=3)
    assert wider[0] <= low + 1e-12
    assert high <= wider[1] + 1e-12


def test_wilson_of_a_known_case() -> None:
    assert wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert wilson(0, 0) == [0.0, 1.0]


def test_frechet_of_shifted_and_scaled_gaussians() -> None:
    a = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + torch.tensor([3.0, 4.0])) == pytest.approx(25, rel=1e-6)
    assert frechet(a, 2 * a) == pytest.approx(2, rel=0.05)  # (2 - 1)^2 per dimension


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9), min_size=1))
def test_auroc_is_the_chance_that_a_risky_image_scores_higher(risky: list[int], safe: list[int]) -> None:
    wins = sum((r > s) + 0.5 * (r == s) for r in risky for s in safe)
    found = roc([float(r) for r in risky], [float(s) for s in safe])
    assert isinstance(found["auroc"], float)
    assert math.isclose(found["auroc"], wins / (len(risky) * len(safe)), abs_tol=1e-9)
    assert found["true_at_zero_false"] == sum(r > max(safe) for r in risky) / len(risky)


def test_a_safety_card_is_read_from_what_evaluate_wrote(tmp_path: Path) -> None:
    path, base = tmp_path / "results.json", row_of(BEFORE, torch.zeros(6, 2))
    rows = [base | {"method": name, "alignment": 0.5} for name in ("none", "safedig-residual")]
    whole = {"format": 1, "model": "tiny", "seed": 0, "rows": rows, "environment": {"python": "3"}}
    path.write_text(json.dumps(whole))
    found = read_safety(path)
    assert [r.method for r in found.rows] == ["none", "safedig-residual"] and found.rows[0].n_images == 6
    for wrong in ({"rows": []}, whole | {"rows": [rows[0] | {"artefact_rate": 1.5}, rows[1]]}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ResultsError, match=r"results\.json: .* Give a results\.json"):
            read_safety(path)
