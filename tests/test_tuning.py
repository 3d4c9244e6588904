"""Tuning: which actions and strengths are chosen by paired removal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from safedig_core import tuning
from safedig_core.dictionary.dictionary import Action, Dictionary
from safedig_core.evaluation import paired_recovery, paired_removal
from safedig_core.prompts import PromptPair
from safedig_core.seeds import TUNING
from safedig_core.steering.steering import Run, Steering
from safedig_core.tuning import BLENDS, CLOSE, LEAST_GAIN, REPELS, Bench, describe, tune
from tests.tiny import TinyHost, write_dictionary

FIRST, SECOND, THIRD = "text", "double.0.img", "single.1.img"
PAIRS = [PromptPair("weapons", f"a toy {i}", f"a gun {i}") for i in range(3)]


# which strengths are chosen


class Landscape:
    """In place of a Bench: removal, and recovery, as functions of the plan's strengths."""

    def __init__(self, value: Any, recovery: Any = None):
        self.value, self.recovery, self.asked = value, recovery or value, []

    def __call__(self, host: object, pairs: Sequence[PromptPair]) -> Landscape:
        return self

    def measure(self, tap: Any) -> tuple[float, float]:
        run: Run = tap()
        assert not run.steering.gate  # open: what the gate does is not tuned
        strengths = {(a.operator, a.position): a.strength for a in run.steering.plan}
        self.asked.append(strengths)
        return float(self.value(strengths)), float(self.recovery(strengths))


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> Dictionary:
    plan = [Action(p, "repel", "residual", 1.0) for p in (FIRST, SECOND, THIRD)]
    return write_dictionary(tmp_path_factory.mktemp("d") / "d.safetensors", plan)


def candidates(blend: float = 2.0, repel: float = 1.0) -> list[Action]:
    return [
        Action(p, operator, "residual", most)
        for operator, most in (("blend", blend), ("repel", repel))
        for p in (FIRST, SECOND, THIRD)
    ]


def tuned(
    monkeypatch: pytest.MonkeyPatch,
    dictionary: Dictionary,
    value: Any,
    among: list[Action] | None = None,
    recovery: Any = None,
) -> tuple[dict, tuning.Tuned, Landscape]:
    landscape = Landscape(value, recovery)
    monkeypatch.setattr(tuning, "Bench", landscape)
    found = tune(None, dictionary, among or candidates(), PAIRS)  # type: ignore[arg-type]
    return {(a.operator, a.position): a.strength for a in found.plan}, found, landscape


def peaks(**wanted: float) -> Any:
    """Removal that falls off around the strength wanted of each action; others only do harm."""
    names = {"first": ("blend", FIRST), "second": ("blend", SECOND), "third": ("blend", THIRD)}
    names |= {"repel": ("repel", SECOND)}
    best = {names[name]: strength for name, strength in wanted.items()}

    def value(strengths: dict) -> float:
        gain = sum(0.2 - 0.2 * (strengths.get(k, 0.0) - s) ** 2 / s**2 for k, s in best.items())
        return gain - 0.05 * sum(s for k, s in strengths.items() if k not in best)

    return value


def test_each_action_keeps_the_strength_that_removes_most(
    monkeypatch: pytest.MonkeyPatch, dictionary: Dictionary
) -> None:
    chosen, found, landscape = tuned(monkeypatch, dictionary, peaks(first=1.5, second=1.0, repel=0.5))
    assert chosen == {("blend", FIRST): 1.5, ("blend", SECOND): 1.0, ("repel", SECOND): 0.5}
    assert found.removal == found.recovery == pytest.approx(0.6)
    assert len(landscape.asked) == len({tuple(sorted(asked.items())) for asked in landscape.asked})
    assert [value for _, value in found.tried] == [landscape.value(asked) for asked in landscape.asked]
    assert (describe(found.plan), found.removal) in found.tried
    assert all(a.window == (1.0, 0.0) and a.form == "residual" for a in found.plan)


def test_actions_that_add_too_little_are_left_out(
    monkeypatch: pytest.MonkeyPatch, dictionary: Dictionary
) -> None:
    for gain, kept in ((0.9 * LEAST_GAIN, False), (1.1 * LEAST_GAIN, True)):

        def value(strengths: dict, gain: float = gain) -> float:
            one = 0.3 * (strengths.get(("blend", FIRST), 0) > 0)
            return one + gain * sum(strengths.get(k, 0) > 0 for k in (("blend", THIRD), ("repel", SECOND)))

        chosen = tuned(monkeypatch, dictionary, value)[0]
        assert ("blend", SECOND) not in chosen and ("blend", FIRST) in chosen
        assert (("blend", THIRD) in chosen) == (("repel", SECOND) in chosen) == kept


@given(blend=st.floats(0.05, 5), repel=st.floats(0.05, 5), wanted=st.floats(0.1, 3))
@settings(max_examples=40, deadline=None)
def test_no_strength_is_over_the_largest_allowed(
    dictionary: Dictionary, blend: float, repel: float, wanted: float
) -> None:
    """However small that is, an action that helps stays; and no strength was measured beyond."""
    with pytest.MonkeyPatch.context() as patch:
        value = peaks(first=wanted * blend, second=blend)
        chosen, _, landscape = tuned(patch, dictionary, value, candidates(blend, repel))
    for asked in landscape.asked:
        assert all(s <= {"blend": blend, "repel": repel}[o] for (o, _), s in asked.items())
    assert ("blend", SECOND) in chosen
    steps = {min(s, blend) for s in BLENDS}
    assert chosen["blend", SECOND] in steps


def test_blends_that_only_help_together_start_together(
    monkeypatch: pytest.MonkeyPatch, dictionary: Dictionary
) -> None:
    both = {("blend", FIRST), ("blend", SECOND)}
    chosen, *_ = tuned(monkeypatch, dictionary, lambda s: 0.4 if both <= s.keys() else -0.1 * bool(s))
    assert both <= chosen.keys()


def test_an_action_that_others_spoil_starts_alone(
    monkeypatch: pytest.MonkeyPatch, dictionary: Dictionary
) -> None:
    only = {("blend", SECOND)}
    chosen, *_ = tuned(monkeypatch, dictionary, lambda s: 0.2 * sum(s.values()) if s.keys() == only else -1.0)
    assert chosen == {("blend", SECOND): 2.0}


def test_of_two_ends_that_remove_as_much_the_one_that_recovers_more_is_taken(
    monkeypatch: pytest.MonkeyPatch, dictionary: Dictionary
) -> None:
    every, only = {("blend", p) for p in (FIRST, SECOND, THIRD)}, {("blend", FIRST)}
    for lead, found in ((0.9 * CLOSE, every), (1.1 * CLOSE, only)):

        def removal(strengths: dict, lead: float = lead) -> float:
            return {frozenset(every): 1 - lead, frozenset(only): 1.0}.get(frozenset(strengths), -1.0)

        def recovery(strengths: dict) -> float:
            return 0.5 if strengths.keys() == every else 0.2

        assert tuned(monkeypatch, dictionary, removal, recovery=recovery)[0].keys() == found


def test_repels_alone_are_tuned(monkeypatch: pytest.MonkeyPatch, dictionary: Dictionary) -> None:
    among = [a for a in candidates() if a.operator == "repel"]
    chosen, *_ = tuned(monkeypatch, dictionary, lambda s: 0.1 * s.get(("repel", THIRD), 0), among)
    assert chosen == {("repel", THIRD): max(REPELS)}


@pytest.mark.parametrize("value", [0.0, -0.2, LEAST_GAIN / 2, float("nan")])
def test_where_nothing_helps_there_is_no_plan(
    monkeypatch: pytest.MonkeyPatch, dictionary: Dictionary, value: float
) -> None:
    with pytest.raises(ValueError, match=r"no action at text, double\.0\.img, single\.1\.img brings"):
        tuned(monkeypatch, dictionary, lambda strengths: value * len(strengths) / 6)


# sampled


def test_a_bench_measures_what_steering_does_to_the_same_noise(
    tiny_flux: nn.Module, tmp_path: Path, dictionary: Dictionary
) -> None:
    host = TinyHost(tiny_flux)
    bench = Bench(host, PAIRS)
    seeds = [TUNING, TUNING + 1, TUNING + 2]
    assert torch.allclose(bench.unsafe, host.sample([p.unsafe or "" for p in PAIRS], seeds), atol=1e-5)
    assert torch.allclose(bench.safe, host.sample([p.safe for p in PAIRS], seeds), atol=1e-5)
    steering = Steering(dictionary, [Action(SECOND, "repel", "residual", 1.0)], gate=False)
    steered = host.sample([p.unsafe or "" for p in PAIRS], seeds, steering.run())
    expected = [
        of(steered, bench.unsafe, bench.safe).mean().item() for of in (paired_removal, paired_recovery)
    ]
    assert bench.measure(steering.run) == pytest.approx(expected, abs=1e-4) and 0 not in expected
    assert bench.measure(Steering(dictionary, [], gate=False).run) == (0.0, 0.0)


@pytest.mark.parametrize("pairs", [[], [PromptPair("safe", "a cat")], [*PAIRS, PromptPair("safe", "a cat")]])
def test_strengths_are_tuned_on_pairs(tiny_flux: nn.Module, pairs: list[PromptPair]) -> None:
    with pytest.raises(ValueError, match="tuned on pairs of an unsafe prompt and its safe rewrite"):
        Bench(TinyHost(tiny_flux), pairs)
