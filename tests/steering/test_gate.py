"""The gate: pooling, probing, and calibration on scores whose distribution is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from safedig_core.dictionary.dictionary import Action, Card, Dictionary, Gate, Witness
from safedig_core.prompts import PromptPair
from safedig_core.steering.gate import (
    LENIENCE,
    NEAR,
    NEAR_LENIENCE,
    calibrate,
    calibrated_gate,
    evidence_of,
    pooled,
    probe,
    scores_of,
)
from safedig_core.steering.steering import Steering
from tests.tiny import TINY, TinyHost, flux, rewritten, write_dictionary

POSITIONS = ["double.0.img", "double.1.img", "single.0.img"]
BARE = {p: Witness([i, 7], [1.0, -0.5], 0.0, 1.0, (0.8, 0.4)) for i, p in enumerate(POSITIONS)}


def drawn(risk: Sequence[float], count: int, seed: int) -> Tensor:
    """Scores [N, 3] of images: unit deviation, around `risk` at each of the witnesses."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=g) + torch.tensor(risk)


def made(safe: Tensor, unsafe: Tensor, rate: float, forms: Sequence[str] | None = None) -> Gate:
    return calibrated_gate(BARE, safe, forms or ["other"] * len(safe), unsafe, rate)


def evidence(gate: Gate, scores: Tensor) -> Tensor:
    """[N], as steering computes it."""
    total = torch.zeros(len(scores))
    for position, witness in gate.witnesses.items():
        score = scores[:, POSITIONS.index(position)]
        total += (score / witness.scale - witness.offset / witness.scale).clamp(min=0)
    return total


def opened(gate: Gate, scores: Tensor) -> float:
    return (evidence(gate, scores) > gate.threshold).float().mean().item()


# pooling


def scores(seed: int, tokens: int) -> Tensor:
    """[2, T, 3], of either sign."""
    return torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10_000), st.integers(1, 70), st.sampled_from([2, 3, 4, 16]))
@settings(max_examples=100, deadline=None)
def test_more_tokens_of_the_same_picture_are_no_more_evidence(seed: int, tokens: int, times: int) -> None:
    one = scores(seed, tokens)
    for more in (one.repeat(1, times, 1), one.repeat_interleave(times, 1)):
        assert torch.allclose(pooled(more, "single.0.img"), pooled(one, "single.0.img"), atol=1e-5)


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_other_tokens_dilute_no_prompt(seed: int, tokens: int, more: int) -> None:
    one, other = scores(seed, tokens), scores(seed + 1, more)
    for position in ("text", "double.0.txt"):
        alone = pooled(one, position)
        quieter = other - other.amax() + alone.amin()
        assert torch.equal(pooled(torch.cat([one, quieter], 1), position), alone)
        both = pooled(torch.cat([other, one], 1), position)
        assert torch.equal(both, torch.maximum(alone, pooled(other, position)))


def test_an_image_says_the_mean_of_its_tokens_and_a_prompt_its_strongest() -> None:
    one = torch.tensor([[[1.0], [5.0], [-3.0], [1.0]]])
    assert pooled(one, "double.0.img").item() == 1.0
    assert {pooled(one, p).item() for p in ("text", "pooled", "single.1.txt")} == {5.0}


@pytest.mark.parametrize("position", ["single.0.txt", "double.1.img"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_one_token_that_is_no_number_is_not_missed(
    tmp_path: Path, position: str, value: float, weight: float
) -> None:
    """Whatever the sign of the weight that it meets: an infinite score must not pass for harmless."""

    def change(card: Card) -> None:
        gate = card.domains["weapons"].gate
        assert gate is not None
        gate.witnesses[position] = replace(gate.witnesses[position], weights=[weight] * 5 + [1.0])

    plan = [Action(position, "repel", "residual", 1.0)]
    dictionary = rewritten(write_dictionary(tmp_path / "d.safetensors", plan), "e.safetensors", change)
    site = Steering(dictionary).sites[position]
    z = torch.zeros(2, 64, 6)
    z[1, 7, :5] = value
    assert evidence_of(site, z, position).isfinite().tolist() == [[True], [False]]


@pytest.mark.parametrize("position", ["double.1.img", "single.0.txt"])
@pytest.mark.parametrize("times", [4, 16])
def test_a_larger_picture_or_a_longer_prompt_is_no_more_evidence(
    tmp_path: Path, position: str, times: int
) -> None:
    def change(card: Card) -> None:
        gate = card.domains["weapons"].gate
        assert gate is not None
        told = gate.witnesses[position]
        gate.witnesses[position] = replace(told, weights=[1.0, -0.3, 2.0, 0.5, -0.1, 1.0], offset=0.05)

    plan = [Action(position, "repel", "residual", 1.0)]
    whole = write_dictionary(tmp_path / "d.safetensors", plan, threshold=1.0)
    dictionary = rewritten(whole, "e.safetensors", change)
    a = torch.randn(2, 24, TINY.width, generator=torch.Generator().manual_seed(1))
    sae = dictionary.needed(position, ["weapons"])[1]
    silent = next(row for row in 9 * torch.randn(999, TINY.width) if not (sae.encode(row) > 0).any())

    def found(a: Tensor) -> list[float]:
        run = Steering(dictionary).run()
        run.begin(len(a), 1, torch.device("cpu"))
        run.step(0, 0.5, slice(0, len(a)))
        run(position, a)
        return [image["weapons"]["evidence"] for image in run.receipt()["images"]]

    assert min(found(a)) > 0
    assert found(a.repeat(1, times, 1)) == pytest.approx(found(a), rel=1e-4)
    if position.endswith("txt"):
        padded = torch.cat([a, silent.expand(2, (times - 1) * 24, -1)], 1)
        assert found(padded) == pytest.approx(found(a), rel=1e-4)


# calibration, of scores


@pytest.mark.parametrize("rate", [0.01, 0.05])
@pytest.mark.parametrize("risk", [2.0, 4.0, 8.0])
def test_the_false_positive_rate_holds_on_images_not_seen(rate: float, risk: float) -> None:
    """Two witnesses tell; the third doesn't, which costs where the risk is faint."""
    gate = made(drawn([0, 0, 0], 500, 0), drawn([risk, risk, 0], 500, 1), rate)
    quiet, loud = drawn([0, 0, 0], 20_000, 2), drawn([risk, risk, 0], 20_000, 3)
    assert gate.prompts == 500 and gate.false_positive_rate <= rate + 1e-6
    assert opened(gate, quiet) <= rate + 3 * (rate / 500) ** 0.5  # of 500, the share varies
    assert opened(gate, loud) > {2.0: 0.4, 4.0: 0.97, 8.0: 0.999}[risk]


@given(
    seed=st.integers(0, 1000),
    rate=st.sampled_from([0.01, 0.02, 0.05]),
    risk=st.floats(0.5, 6),
    sizes=st.tuples(*[st.integers(5, 80)] * 3),
    shifts=st.tuples(*[st.floats(-1, 3)] * 3),
)
@settings(max_examples=60, deadline=None)
def test_what_the_card_says_of_each_form_is_so(
    seed: int, rate: float, risk: float, sizes: tuple, shifts: tuple
) -> None:
    """On the very images that it was calibrated on; and no form opens more often than its lenience allows."""
    names = ["name", NEAR + "risk", "scene"]
    forms = [name for name, size in zip(names, sizes, strict=True) for _ in range(size)]
    safe = torch.cat(
        [drawn([s] * 3, n, seed + i) for i, (n, s) in enumerate(zip(sizes, shifts, strict=True))]
    )
    gate = made(safe, drawn([risk] * 3, 60, seed + 9), rate, forms)
    found = evidence(gate, safe)
    near = (found - gate.threshold).abs() < 1e-4 * max(gate.threshold, 1.0)  # rounding may decide there
    assert gate.prompts == len(safe) and set(gate.forms) == set(names)
    assert gate.false_positive_rate == sum(a for a, _ in gate.forms.values()) / len(safe)
    assert gate.false_positive_rate <= rate + 1 / len(safe)
    for name, size in zip(names, sizes, strict=True):
        mine = torch.tensor([form == name for form in forms])
        count, of = gate.forms[name]
        assert of == size
        assert abs(count - int((found[mine] > gate.threshold).sum())) <= int(near[mine].sum())
        lenience = NEAR_LENIENCE if name.startswith(NEAR) else LENIENCE
        assert count / size <= min(0.5, lenience * rate) + 1 / size


def test_a_form_that_looks_risky_raises_the_threshold_and_near_risk_less() -> None:
    """Of 2,000 safe images 40 are alike and loud: few enough for the rate over all, too many for a form."""
    rate = 0.02

    def threshold(form: str) -> float:
        g = torch.Generator().manual_seed(5)
        loud = 3 * torch.rand(40, 1, generator=g).expand(40, 3) + 2.2
        safe, forms = torch.cat([drawn([0, 0, 0], 1960, 0), loud]), ["other"] * 1960 + [form] * 40
        return made(safe, drawn([4, 4, 4], 200, 1), rate, forms).threshold

    assert threshold("other") < threshold(NEAR + "risk") < threshold("name")


def test_each_witness_counts_in_units_of_what_safe_images_reach() -> None:
    safe = drawn([0, 0, 0], 500, 0) * torch.tensor([1.0, 10.0, 100.0])
    gate = made(safe, drawn([5, 5, -5], 500, 1), 0.01)
    assert list(gate.witnesses) == POSITIONS
    for p, (position, witness) in enumerate(gate.witnesses.items()):
        bare = BARE[position]
        assert (witness.features, witness.weights) == (bare.features, bare.weights)
        assert witness.window == (0.8, 0.4)
        assert witness.offset == pytest.approx(safe[:, p].median().item())
        reached = safe[:, p].quantile(0.99).item() - witness.offset
        assert witness.scale == pytest.approx(len(POSITIONS) * reached)  # all are of image tokens


def test_witnesses_at_image_tokens_together_count_as_one() -> None:
    """They see the same picture: more of them are no more evidence than one."""
    told = BARE["single.0.img"]
    places = ["text", "pooled", *POSITIONS]
    safe = torch.cat([drawn([0, 0, 0], 500, 0), drawn([0, 0, 0], 500, 1)], 1)[:, :5]
    gate = calibrated_gate(
        dict.fromkeys(places, told), safe, ["other"] * 500, safe[:50] + 5, false_positive_rate=0.01
    )
    reached = (safe.quantile(0.99, dim=0) - safe.median(0).values).tolist()
    scales = [gate.witnesses[place].scale / reach for place, reach in zip(places, reached, strict=True)]
    assert scales == pytest.approx([1, 1, 3, 3, 3], rel=1e-4)


def test_one_sure_witness_opens_the_gate_though_no_calibration_prompt_needed_it() -> None:
    """As image tokens do where a name is new: calibration prompts were all told by the first witness."""
    gate = made(drawn([0, 0, 0], 500, 0), drawn([9, 3, 0], 500, 1), 0.01)
    assert opened(gate, drawn([0, 12, 0], 500, 2)) > 0.9
    blind = made(drawn([0, 0, 0], 500, 0), drawn([0, 0, 0], 500, 1), 0.01)
    assert opened(blind, drawn([0, 0, 0], 5000, 2)) < 0.04


def test_where_there_is_room_the_threshold_is_raised_by_a_quarter() -> None:
    safe, unsafe = drawn([0, 0, 0], 500, 0), drawn([30, 30, 30], 500, 1)
    gate = made(safe, unsafe, 0.01)
    limit, room = evidence(gate, safe).quantile(0.99), evidence(gate, unsafe).quantile(0.05)
    assert gate.threshold == pytest.approx((limit + 0.25 * (room - limit)).item(), rel=1e-2)
    assert gate.false_positive_rate == 0 and opened(gate, unsafe) == 1


@given(st.floats(1e-2, 1e3), st.floats(-50, 50), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_gate_does_not_depend_on_the_scale_of_a_read_out(factor: float, shift: float, seed: int) -> None:
    quiet, loud = drawn([0, 0, 0], 100, seed), drawn([3, 3, 0], 100, seed + 1)
    gate, scaled = made(quiet, loud, 0.02), made(factor * quiet + shift, factor * loud + shift, 0.02)
    assert scaled.threshold == pytest.approx(gate.threshold, rel=0.05)
    seen = drawn([1.5, 1.5, 0], 2000, seed + 2)
    assert opened(scaled, factor * seen + shift) == pytest.approx(opened(gate, seen), abs=0.02)


def test_witnesses_that_never_fire_on_safe_images_are_calibrated() -> None:
    loud = drawn([3, 3, 3], 100, 0).clamp(min=0.1)
    gate = made(torch.zeros(100, 3), loud, 0.01)
    assert gate.false_positive_rate == 0 and opened(gate, torch.zeros(10, 3)) == 0
    assert opened(gate, loud) > 0.9
    silent = made(torch.zeros(100, 3), torch.zeros(50, 3), 0.01)
    assert opened(silent, torch.zeros(10, 3)) == 0


# probing


def test_the_probe_measures_the_scores_that_steering_sees(tiny_flux: nn.Module, tmp_path: Path) -> None:
    """Probing and steering read the same, each in its window; the probe changes nothing."""
    window, at = (0.8, 0.4), POSITIONS[:2]
    plan = [Action(p, "repel", "residual", 0.0) for p in at]
    dictionary = write_dictionary(tmp_path / "d.safetensors", plan, gate_window=window)
    host, prompts, done = TinyHost(tiny_flux), ["a cat", "a dog", "a pistol"], []
    seen = probe(host, dictionary, ["weapons"], prompts, 5, lambda *count: done.append(count))
    assert seen.shape == (3, 2, 1) and (seen > 0).all() and done == [(2, 3), (3, 3)]
    run = Steering(dictionary).run()
    latents = host.sample(prompts, [5, 6, 7], run)
    found = [image["weapons"]["evidence"] for image in run.receipt()["images"]]
    assert found == pytest.approx(seen[:, :, 0].sum(1).tolist(), rel=1e-4)
    assert torch.equal(latents, host.sample(prompts, [5, 6, 7]))


def test_scores_are_in_units_of_the_witness_and_may_lie_under_its_offset(tmp_path: Path) -> None:
    def change(card: Card) -> None:
        gate = card.domains["weapons"].gate
        assert gate is not None
        gate.witnesses[AT] = replace(gate.witnesses[AT], weights=[-1.0] * 6, scale=4.0, offset=-2.0)

    AT = POSITIONS[0]
    plain = write_dictionary(tmp_path / "d.safetensors", [Action(AT, "repel", "residual", 1.0)])
    a = torch.randn(2, 24, TINY.width, generator=torch.Generator().manual_seed(1))
    sites = [Steering(d).sites[AT] for d in (plain, rewritten(plain, "e.safetensors", change))]
    one, other = (scores_of(site, site.code(a), AT) for site in sites)
    torch.testing.assert_close(other, -one / 4)
    found = evidence_of(sites[1], sites[1].code(a), AT)
    torch.testing.assert_close(found, (0.5 - one / 4).clamp(min=0))


def test_a_domain_without_a_witness_somewhere_has_no_score_there(
    tiny_flux: nn.Module, tmp_path: Path
) -> None:
    def change(card: Card) -> None:
        for name, position in zip(("weapons", "shock"), POSITIONS[:2], strict=True):
            gate = card.domains[name].gate
            assert gate is not None
            gate.witnesses = {position: gate.witnesses[position]}

    plan = [Action(p, "repel", "residual", 0.0) for p in POSITIONS[:2]]
    whole = write_dictionary(tmp_path / "d.safetensors", plan, domains=("weapons", "shock"))
    dictionary = rewritten(whole, "e.safetensors", change)
    seen = probe(TinyHost(tiny_flux), dictionary, ["weapons", "shock"], ["a cat", "a dog"], 0)
    assert seen.isfinite().tolist() == [[[True, False], [False, True]]] * 2


# calibration, of a dictionary


PAIRS = [
    PromptPair("weapons", f"a {word} and a book", f"a {word} and a pistol", form=form)
    for word, form in (("cat", "name"), ("dog", "scene"))
]
OTHERS = [PromptPair("shock", "a hat", "a skull"), PromptPair("safe", "a tree", form="name")]


def test_calibration_reads_every_witness_and_says_how_each_form_did(
    tiny_flux: nn.Module, tmp_path: Path
) -> None:
    """What stood on the card before doesn't matter; safe sides of other domains count too."""
    plan = [Action(POSITIONS[0], "repel", "residual", 1.0, domain="weapons")]
    plan += [Action(p, "repel", "residual", 1.0, domain="shock") for p in POSITIONS[1:]]
    dictionary = write_dictionary(tmp_path / "d.safetensors", plan, domains=("weapons", "shock"))
    host, done = TinyHost(tiny_flux), []
    gate = calibrate(host, dictionary, "weapons", [*PAIRS, *OTHERS], 0.01, lambda *count: done.append(count))
    assert gate.prompts == 4 and done == [(2, 6), (4, 6), (6, 6)]  # images: four safe, two unsafe
    assert {form: of for form, (_, of) in gate.forms.items()} == {"name": 2, "scene": 1, "other": 1}
    assert set(gate.witnesses) <= set(POSITIONS)

    def change(card: Card) -> None:
        old = card.domains["weapons"].gate
        assert old is not None
        for position, witness in old.witnesses.items():
            old.witnesses[position] = replace(witness, offset=3.0, scale=7.0)
        old.threshold = 99.0

    again = calibrate(
        host, rewritten(dictionary, "e.safetensors", change), "weapons", [*PAIRS, *OTHERS], 0.01
    )
    assert again == gate


def test_the_rate_of_a_calibrated_dictionary_is_that_of_its_receipts(
    tiny_flux: nn.Module, tmp_path: Path
) -> None:
    """Calibration and steering agree on every image, by form."""
    plan = [Action(p, "repel", "residual", 0.0) for p in POSITIONS]
    dictionary, host = write_dictionary(tmp_path / "d.safetensors", plan), TinyHost(tiny_flux)
    safe = [PromptPair("safe", f"a thing {i}", form="ab"[i % 2]) for i in range(12)]
    risky = [PromptPair("weapons", f"a toy {i}", f"a gun {i}", form="c") for i in range(4)]
    gate = calibrate(host, dictionary, "weapons", [*safe, *risky], 0.05)

    def change(card: Card) -> None:
        card.domains["weapons"].gate = gate

    steering, pairs = Steering(rewritten(dictionary, "e.safetensors", change)), [*safe, *risky]
    found: dict[str, list[bool]] = {}
    for start in range(0, len(pairs), 2):
        run, some = steering.run(), pairs[start : start + 2]
        seeds = [3_500_000_000 + start, 3_500_000_000 + start + 1]
        host.sample([pair.safe for pair in some], seeds, run)
        for pair, image in zip(some, run.receipt()["images"], strict=True):
            found.setdefault(pair.form, []).append(image["weapons"]["found_at_step"] is not None)
    assert gate.forms == {form: (sum(mine), len(mine)) for form, mine in found.items()}
    assert gate.false_positive_rate == sum(sum(mine) for mine in found.values()) / 16


def test_the_gate_of_a_domain_does_not_depend_on_others(tiny_flux: nn.Module, tmp_path: Path) -> None:
    plan, host = [Action(p, "repel", "residual", 1.0) for p in POSITIONS], TinyHost(tiny_flux)
    alone = write_dictionary(tmp_path / "a.safetensors", plan)
    both = write_dictionary(tmp_path / "b.safetensors", plan, domains=("weapons", "shock"))
    assert calibrate(host, both, "weapons", PAIRS, 0.01) == calibrate(host, alone, "weapons", PAIRS, 0.01)


def test_calibration_says_what_it_lacks(tiny_flux: nn.Module, tmp_path: Path) -> None:
    host = TinyHost(tiny_flux)

    def written(name: str, **options) -> Dictionary:
        plan = [Action(POSITIONS[0], "repel", "residual", 1.0)]
        return write_dictionary(tmp_path / f"{name}.safetensors", plan, **options)

    whole = written("whole")
    with pytest.raises(ValueError, match="no unsafe one of 'weapons'"):
        calibrate(host, whole, "weapons", [PromptPair("safe", "a cat")], 0.01)
    bare = whole.with_domains({name: replace(d, gate=None) for name, d in whole.card.domains.items()})
    with pytest.raises(ValueError, match="nothing was learned that could tell 'weapons'"):
        calibrate(host, bare, "weapons", PAIRS, 0.01)
    narrow = written("narrow", gate_window=(0.7, 0.6))
    with pytest.raises(ValueError, match=r"double.0.img can't be read: none of tiny's 4 steps is in its"):
        calibrate(host, narrow, "weapons", PAIRS, 0.01)
    broken = flux()
    for parameter in broken.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="what tiny computes at double.0.img is not finite"):
        calibrate(TinyHost(broken), whole, "weapons", PAIRS, 0.01)
