"""Routing against measured benefit: ranks, and the study on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedig_core.chain import Chain
from safedig_core.pocket.benefit import ranks, spearman, study
from safedig_core.progress import nothing
from safedig_core.prompts import PromptPair
from safedig_core.recipe import Credits, Recipe
from safedig_core.routing import route
from safedig_core.training import TrainSettings
from safedig_core.tuning import LEAST_GAIN
from tests.tiny import WordHost, captured

NUMBERS = st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=20)


def lines(start: int, **counts: int) -> list[PromptPair]:
    return [
        PromptPair(domain, f"a {domain[0]}-thing {i}", f"a {domain} {i}" if domain != "safe" else None)
        for domain, count in counts.items()
        for i in range(start, start + count)
    ]


@given(NUMBERS)
def test_ranks_are_mean_places_in_order(values: list[float]) -> None:
    places = [[i for i, v in enumerate(sorted(values)) if v == value] for value in values]
    assert ranks(values).tolist() == [sum(p) / len(p) for p in places]


def test_rank_correlation() -> None:
    assert spearman([1, 2, 3, 4], [1, 10, 11, 100]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24)


def test_the_study_measures_every_position_and_operator(tiny_flux: torch.nn.Module, tmp_path: Path) -> None:
    host, positions = WordHost(tiny_flux), ["text", "double.1.img", "single.1.img"]
    store = captured(host, tmp_path / "store", lines(0, weapons=6, substances=6, safe=6), positions)
    small = Recipe(train=TrainSettings(features=48, k=4, steps=50, batch=64, warmup=5), most_features=8)
    tune = lines(100, weapons=3, substances=3, safe=3)
    chain = Chain(lambda: host, store, tune, small, Credits(creator="me"))
    routes = route(host, store, "weapons", "substances", tune)
    found = study(chain, routes, tmp_path, nothing)
    assert {(line["position"], line["operator"]) for line in found["routes"]} == {
        (position, operator) for position in positions for operator in ("blend", "repel")
    }
    assert all(0 <= line["benefit"] <= 1 for line in found["routes"])
    assert found["spearman"].keys() == {"score", "semantic", "binding", "stability", "cost"}
    best, by_routing = found["plans"]["best"], found["plans"]["routed"]
    assert len(best["positions"]) == len(by_routing["positions"])
    assert found["regret"] == pytest.approx(1 - by_routing["removal"] / best["removal"])
    alone = max(line["benefit"] for line in found["routes"] if line["operator"] == "blend")
    assert best["removal"] >= alone - 3 * LEAST_GAIN
