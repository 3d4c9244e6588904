"""Runs: where evidence is read, what counts as found, what counts as moved, and what the receipt says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from safedig_core.dictionary.card import MAX_DOMAINS
from safedig_core.dictionary.dictionary import (
    Action,
    Card,
    Dictionary,
    DictionaryError,
    Domain,
    Gate,
    Window,
    Witness,
    save_adapter,
)
from safedig_core.sae import SAE
from safedig_core.steering.gate import evidence_of
from safedig_core.steering.site import Windows
from safedig_core.steering.steering import UNDONE, RiskFound, Run, Steering, status
from tests.tiny import APART, TINY, TinyHost, rewritten, without_gates, write_dictionary

EARLY, LATE = "double.0.img", "single.1.img"
NEVER = 1e3  # a threshold that no evidence of these tests reaches
PLAN = [Action(p, operator, "residual", 1.0) for p in (EARLY, LATE) for operator in ("blend", "repel")]
REPEL_LATE = [Action(LATE, "repel", "residual", 1.0)]
FORMS = [(operator, form) for operator in ("blend", "repel") for form in ("residual", "paper")]


def loud(seed: int = 0, images: int = 1, tokens: int = 10) -> Tensor:
    return 2 * torch.randn(images, tokens, TINY.width, generator=torch.Generator().manual_seed(seed))


def begun(steering: Steering, images: int = 1, steps: int = 1) -> Run:
    run = steering.run()
    run.begin(images, steps, torch.device("cpu"))
    return run


def pass_through(run: Run, a: Tensor, index: int = 0, sigma: float | Tensor = 0.8) -> dict[str, Tensor]:
    """One forward pass in which every position is given `a`: what came back of each."""
    run.step(index, sigma, slice(0, len(a)))
    return {position: run(position, a) for position in run.positions}


def of(run: Run, domain: str = "weapons", image: int = 0) -> dict:
    receipt = run.receipt()
    assert json.loads(json.dumps(receipt, allow_nan=False)) == receipt
    return receipt["images"][image][domain]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def dictionary(tmp_path: Path) -> Dictionary:
    return write_dictionary(tmp_path / "d.safetensors", PLAN)


def told(features: list[int], window: Window = (1.0, 0.0), **changes: Any) -> Witness:
    """A witness that adds up the activity of these features."""
    return replace(Witness(features, [1.0] * len(features), 0.0, 1.0, window), **changes)


def witness_only(dictionary: Dictionary, position: str, threshold: float, window=(1.0, 0.0)) -> Dictionary:
    """The dictionary with one witness for all its domains."""

    def change(card: Card) -> None:
        for domain in card.domains.values():
            domain.gate = Gate({position: told(domain.features[position], window)}, threshold, 0.0, 10)

    return rewritten(dictionary, f"{position}-{threshold}.safetensors", change)


# where evidence is read


def test_evidence_is_read_at_every_witness_whatever_the_plan(dictionary: Dictionary) -> None:
    told_early = witness_only(dictionary, EARLY, 0.0)
    steering = Steering(told_early, REPEL_LATE)
    assert steering.positions == (EARLY, LATE) and steering.acting == (LATE,)
    assert steering.witnesses == {"weapons": [EARLY]}
    run, a = begun(steering), loud()
    out = pass_through(run, a)
    assert out[EARLY] is a  # looked at only
    assert not torch.equal(out[LATE], a)
    found = of(run)
    assert found["status"] == "steered" and found["looked"] == 1 and found["found_at_step"] == 0
    site = steering.sites[EARLY]
    assert found["evidence"] == pytest.approx(evidence_of(site, site.code(a), EARLY).item())
    assert run.receipt()["calls"] == [[1], [1]]

    quiet = begun(Steering(witness_only(dictionary, EARLY, NEVER), REPEL_LATE))
    assert same_bits(pass_through(quiet, a)[LATE], a)
    assert of(quiet)["status"] == "clear" and of(quiet)["looked"] == 1


@pytest.mark.parametrize("on_device", [False, True])
def test_a_witness_is_read_in_its_own_window(dictionary: Dictionary, on_device: bool) -> None:
    """It tells at the start of a run; the action sets in at its end."""
    plan = [Action(p, "repel", "residual", 1.0, (0.5, 0.1)) for p in (EARLY, LATE)]
    steering, a = Steering(witness_only(dictionary, EARLY, 0.0, (1.0, 0.7)), plan), loud()
    run = begun(steering, steps=4)
    moved = []
    for index, sigma in enumerate((1.0, 0.7, 0.5, 0.05)):
        out = pass_through(run, a, index, torch.tensor(sigma) if on_device else sigma)
        moved.append([not same_bits(out[p], a) for p in (EARLY, LATE)])
    assert moved == [[False, False], [False, False], [True, True], [False, False]]
    assert of(run)["looked"] == 2 and of(run)["found_at_step"] == 0
    assert (run.history[:, 0, 0] == run.history[0, 0, 0]).all() and run.history[0, 0, 0] > 0


@given(st.tuples(st.floats(0, 1), st.floats(0, 1)), st.floats(0, 1) | st.none(), st.booleans())
@settings(deadline=None)
def test_a_window_holds_the_same_levels_on_a_device(
    window: tuple[float, float], sigma: float | None, at_start: bool
) -> None:
    start, end = max(window), min(window)
    level = (start if at_start else end) if sigma is None else sigma  # its ends are in it
    windows = Windows([(start, end), None], torch.device("cpu"))
    inside, never = windows.hold(level).tolist()
    assert not never and windows.hold(torch.tensor(level)).tolist() == [inside, False]
    assert windows.open(level) == inside and (inside or sigma is not None)


def test_what_is_found_late_is_not_acted_on_before(dictionary: Dictionary) -> None:
    run, a = begun(Steering(witness_only(dictionary, LATE, 0.0), PLAN), steps=2), loud()
    first, second = pass_through(run, a, 0), pass_through(run, a, 1)
    assert same_bits(first[EARLY], a) and not same_bits(first[LATE], a)
    assert not same_bits(second[EARLY], a)


def test_witnesses_of_adapters_are_read_too(dictionary: Dictionary) -> None:
    base = witness_only(dictionary, EARLY, 0.0)
    found = Domain({LATE: [7]}, Gate({LATE: told([7])}, 0.0, 0.0, 10))
    card = Card(TINY, domains={"shock": found}, base_sha256=base.sha256)
    path = base.path.with_name("shock.safetensors")
    save_adapter(path, card, {})
    steering = Steering(base.with_adapters(path), [Action(EARLY, "repel", "residual", 1.0, domain="weapons")])
    assert steering.witnesses == {"weapons": [EARLY], "shock": [LATE]}
    run = begun(steering)
    pass_through(run, loud())
    assert of(run, "shock")["looked"] == 1 and of(run, "shock")["status"] == "found, nothing moved"

    found.gate = Gate({"text": told([0])}, 0.0, 0.0, 10)
    save_adapter(path, card, {})
    with pytest.raises(DictionaryError, match="position 'text', which is not there"):
        base.with_adapters(path)


def test_a_model_is_steered_where_only_a_far_witness_tells(tiny_flux: nn.Module, tmp_path: Path) -> None:
    dictionary = witness_only(write_dictionary(tmp_path / "d.safetensors", PLAN), EARLY, 0.0)
    host, steering = TinyHost(tiny_flux), Steering(dictionary, REPEL_LATE)
    run = steering.run()
    out = host.sample(["a cat", "a dog"], [0, 1], run)
    assert not torch.equal(out, host.sample(["a cat", "a dog"], [0, 1]))
    receipt = run.receipt()
    assert receipt["calls"] == [[1] * 4, [1] * 4] and receipt["acting"] == [LATE]
    assert [image["weapons"]["status"] for image in receipt["images"]] == ["steered"] * 2


# what evidence adds up to


def with_gate(dictionary: Dictionary, gate: Gate, name: str = "gate") -> Dictionary:
    def change(card: Card) -> None:
        card.domains["weapons"].gate = gate

    return rewritten(dictionary, f"{name}.safetensors", change)


def evidence(dictionary: Dictionary, a: Tensor, plan: list[Action] = REPEL_LATE) -> float:
    run = begun(Steering(dictionary, plan))
    pass_through(run, a)
    return of(run)["evidence"]


def test_the_evidence_of_witnesses_adds_up(dictionary: Dictionary) -> None:
    """Neither would open the gate alone; both together do, from the second one on."""
    a = loud()
    parts = {EARLY: told([0, 1]), LATE: told([2, 3, 4], scale=0.5)}
    alone = {p: evidence(with_gate(dictionary, Gate({p: w}, NEVER, 0.0, 1), p), a) for p, w in parts.items()}
    assert min(alone.values()) > 0
    limit = (max(alone.values()) + sum(alone.values())) / 2
    run = begun(Steering(with_gate(dictionary, Gate(parts, limit, 0.0, 1)), PLAN))
    out = pass_through(run, a)
    assert same_bits(out[EARLY], a) and not same_bits(out[LATE], a)
    assert of(run)["evidence"] == pytest.approx(sum(alone.values()))
    closed = begun(Steering(with_gate(dictionary, Gate(parts, 1.01 * sum(alone.values()), 0.0, 1)), PLAN))
    assert all(same_bits(b, a) for b in pass_through(closed, a).values())


def test_each_witness_counts_with_the_most_that_it_ever_said(dictionary: Dictionary) -> None:
    """Not the largest sum of one step: one tells early in a run, the other late."""
    windows = {EARLY: (1.0, 0.7), LATE: (0.6, 0.0)}
    gate = Gate({p: told([0, 1, 2], w) for p, w in windows.items()}, NEVER, 0.0, 1)
    run = begun(Steering(with_gate(dictionary, gate), REPEL_LATE), steps=4)
    parts = [loud(seed) * size for seed, size in enumerate((0.3, 1.0, 0.8, 0.2))]
    for index, (sigma, a) in enumerate(zip((1.0, 0.8, 0.6, 0.3), parts, strict=True)):
        pass_through(run, a, index, sigma)
    site = {p: run.steering.sites[p] for p in windows}

    def said(position: str, steps: range) -> float:
        return max(evidence_of(site[position], site[position].code(parts[i]), position).item() for i in steps)

    assert of(run)["evidence"] == pytest.approx(said(EARLY, range(2)) + said(LATE, range(2, 4)))


@given(
    seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=6),
    sizes=st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]), min_size=6, max_size=6),
    limit=st.floats(0.05, 5),
)
@settings(max_examples=60, deadline=None)
def test_evidence_never_falls_and_an_open_gate_stays_open(
    tmp_path_factory: pytest.TempPathFactory, seeds: list[int], sizes: list[float], limit: float
) -> None:
    made = write_dictionary(tmp_path_factory.mktemp("d") / "d.safetensors", PLAN)
    witnesses = {p: told([0, 1, 2, 3], weights=[1.0, -0.5, 2.0, -1.0], offset=0.1) for p in (EARLY, LATE)}
    steering = Steering(with_gate(made, Gate(witnesses, limit, 0.0, 1)), REPEL_LATE)
    run, last, opened = begun(steering, images=2, steps=len(seeds)), torch.zeros(2), torch.zeros(2).bool()
    for index, seed in enumerate(seeds):
        a = sizes[index] * loud(seed, images=2)
        out = pass_through(run, a, index)[LATE]
        now = run.history[index, :, 0]
        assert (now >= last).all()
        is_open = now > limit
        assert (is_open | ~opened).all()
        for image in range(2):
            assert is_open[image] or same_bits(out[image], a[image])
        last, opened = now.clone(), is_open
    found = [of(run, image=i)["found_at_step"] for i in range(2)]
    assert [at is not None for at in found] == opened.tolist()


def test_weights_of_either_sign_tell(dictionary: Dictionary) -> None:
    """What speaks for harmlessness takes from what speaks for the risk."""
    a = loud()
    score = {
        name: evidence(with_gate(dictionary, Gate({EARLY: witness}, NEVER, 0.0, 1), name), a)
        for name, witness in {
            "for": told([0, 1]),
            "against": told([2, 3]),
            "both": told([0, 1, 2, 3], weights=[2.0, 2.0, -1.0, -1.0]),
            "reversed": told([0, 1, 2, 3], weights=[-2.0, -2.0, 1.0, 1.0]),
        }.items()
    }
    difference = 2 * score["for"] - score["against"]
    assert abs(difference) > 0.01
    assert score["both"] == pytest.approx(max(difference, 0.0), abs=1e-5)
    assert score["reversed"] == pytest.approx(max(-difference, 0.0), abs=1e-5)


@given(st.integers(0, 1000), st.floats(-2, 4), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_under_its_offset_a_witness_says_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, offset: float, scale: float
) -> None:
    made = write_dictionary(tmp_path_factory.mktemp("d") / "d.safetensors", PLAN)
    a = loud(seed)
    gate = Gate({EARLY: told([0, 1, 2], offset=offset, scale=scale)}, 0.0, 0.0, 1)
    score = made.sae(EARLY).encode(a)[..., :3].sum(-1).mean().item()
    found = evidence(with_gate(made, gate), a)
    assert found == pytest.approx(max(score - offset, 0.0) / scale, rel=1e-3, abs=1e-4)
    if score < offset - 1e-3:
        run = begun(Steering(with_gate(made, gate), REPEL_LATE))
        assert same_bits(pass_through(run, a)[LATE], a) and of(run)["status"] == "clear"


def test_a_witness_needs_no_acting_features_there_nor_they_a_witness(dictionary: Dictionary) -> None:
    def change(card: Card) -> None:
        domain = card.domains["weapons"]
        domain.features = {EARLY: [], LATE: [0, 1]}
        domain.gate = Gate({EARLY: told([3, 5])}, 0.0, 0.0, 1)

    made = rewritten(dictionary, "apart.safetensors", change)
    assert made.needed(EARLY, ["weapons"])[0] == [3, 5] and made.needed(LATE, ["weapons"])[0] == [0, 1]
    run, a = begun(Steering(made, REPEL_LATE)), loud()
    out = pass_through(run, a)
    assert out[EARLY] is a and of(run)["status"] == "steered"
    z = made.needed(LATE, ["weapons"])[1].encode(a)
    assert torch.equal((out[LATE] != a).any(-1), (z > 0).any(-1))  # what tells elsewhere doesn't act here
    with pytest.raises(DictionaryError, match=f"nothing at {EARLY} serves"):
        Steering(made, [Action(EARLY, "repel", "residual", 1.0)])


def test_features_that_only_tell_do_not_act(dictionary: Dictionary) -> None:
    def change(card: Card) -> None:
        domain = card.domains["weapons"]
        domain.features = {LATE: [0, 1], EARLY: []}
        domain.gate = Gate({LATE: told([2, 3, 4, 5])}, 0.0, 0.0, 1)

    made, a = rewritten(dictionary, "both.safetensors", change), loud()
    for operator in ("repel", "blend"):
        out = pass_through(begun(Steering(made, [Action(LATE, operator, "residual", 1.0)])), a)[LATE]
        alone = with_gate(made, Gate({LATE: told([0])}, -1.0, 0.0, 1), operator)
        expected = pass_through(begun(Steering(alone, [Action(LATE, operator, "residual", 1.0)])), a)[LATE]
        assert not same_bits(out, a)
        torch.testing.assert_close(out, expected)


def test_the_gate_of_a_domain_does_not_heed_others(dictionary: Dictionary) -> None:
    """Its evidence is the same with and without them, and only its own actions set in."""
    made, a = two_domains(dictionary), loud()

    def limits(weapons: float, shock: float) -> Dictionary:
        def change(card: Card) -> None:
            for name, limit in (("weapons", weapons), ("shock", shock)):
                gate = card.domains[name].gate
                assert gate is not None
                gate.threshold = limit

        return rewritten(made, f"{weapons}-{shock}.safetensors", change)

    plan, seen, evidence = [Action(LATE, "repel", "residual", 1.0)], {}, []
    for opened in ((False, False), (True, False), (False, True), (True, True)):
        run = begun(Steering(limits(*(0.0 if o else NEVER for o in opened)), plan))
        seen[opened] = pass_through(run, a)[LATE] - a
        found = [of(run, name) for name in ("weapons", "shock")]
        assert [f["status"] for f in found] == ["steered" if o else "clear" for o in opened]
        evidence.append([f["evidence"] for f in found])
    assert all(found == evidence[0] for found in evidence) and min(evidence[0]) > 0
    assert not seen[False, False].any()
    torch.testing.assert_close(seen[True, True], seen[True, False] + seen[False, True])


# what counts as found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("operator", "form"), FORMS)
def test_what_is_no_number_counts_as_found(
    dictionary: Dictionary, operator: str, form: str, value: float, dtype: torch.dtype
) -> None:
    steering = Steering(witness_only(dictionary, EARLY, NEVER), [Action(EARLY, operator, form, 1.0)])
    a = loud(images=2).to(dtype)
    a[1, 3, 4] = value
    run = begun(steering, images=2)
    out = pass_through(run, a)[EARLY]
    assert same_bits(out[0], a[0]) and not same_bits(out[1], a[1])
    assert of(run, image=0)["status"] == "clear"
    found = of(run, image=1)
    assert found["status"] == "steered" and found["evidence"] is None and found["found_at_step"] == 0


def test_what_is_no_number_stops_a_run(dictionary: Dictionary) -> None:
    modes = {"weapons": "stop"}
    run = begun(Steering(witness_only(dictionary, EARLY, NEVER), REPEL_LATE, modes=modes), images=2)
    a = loud(images=2)
    pass_through(run, a)
    a[1] = torch.nan
    with pytest.raises(RiskFound, match="weapons found in picture 2 of the batch at step 1 "):
        pass_through(run, a)


@pytest.mark.parametrize(("operator", "form"), FORMS)
def test_without_the_gate_it_acts_everywhere_and_finds_by_evidence(
    dictionary: Dictionary, operator: str, form: str
) -> None:
    a, plan = loud(), [Action(LATE, operator, form, 0.5)]
    never, always = witness_only(dictionary, EARLY, NEVER), witness_only(dictionary, EARLY, 0.0)
    for made, expected in ((never, "steered without evidence"), (always, "steered")):
        run = begun(Steering(made, plan, gate=False))
        assert not same_bits(pass_through(run, a)[LATE], a)
        assert of(run)["status"] == expected
    for made, expected in ((never, "clear"), (always, "observed")):
        run = begun(Steering(made, plan, gate=False, modes={"weapons": "observe"}))
        assert same_bits(pass_through(run, a)[LATE], a)
        assert of(run)["status"] == expected
    pass_through(begun(Steering(never, plan, gate=False, modes={"weapons": "stop"})), a)
    with pytest.raises(RiskFound):
        pass_through(begun(Steering(always, plan, gate=False, modes={"weapons": "stop"})), a)


@pytest.mark.parametrize("mode", ["observe", "stop"])
def test_nothing_can_be_observed_without_a_gate(dictionary: Dictionary, mode: str) -> None:
    bare = without_gates(dictionary)
    with pytest.raises(DictionaryError, match=f"'weapons' has no gate that could find it: .* not to {mode}"):
        Steering(bare, modes={"weapons": mode})
    run = begun(Steering(bare))
    pass_through(run, loud())
    assert of(run)["status"] == "steered without evidence" and of(run)["looked"] == 2


# what counts as moved


def test_a_strength_that_moves_no_bit_moves_nothing(dictionary: Dictionary) -> None:
    run, a = begun(Steering(dictionary, REPEL_LATE, strength=1e-12)), loud()
    assert same_bits(pass_through(run, a)[LATE], a)
    assert of(run)["status"] == "found, nothing moved" and of(run)["tokens_moved"] == 0
    assert run.receipt()["tokens_moved"] == [[[0]], [[0]]]


def two_domains(dictionary: Dictionary, zero: bool = False) -> Dictionary:
    """`weapons` has features 0 to 2, `shock` 3 to 5; the rows of shock's adapter can be zero."""
    path = dictionary.path.with_name(f"two{zero}.safetensors")
    made = write_dictionary(path, PLAN, domains=("weapons", "shock"))

    def change(card: Card) -> None:
        for d, domain in enumerate(card.domains.values()):
            mine = [3 * d, 3 * d + 1, 3 * d + 2]
            domain.features = dict.fromkeys(domain.features, mine)
            domain.gate = Gate(dict.fromkeys(domain.features, told(mine)), 0.0, 0.0, 10)

    return rewritten(made, path.name, change, (lambda d, t: 0 * t if d == "shock" else t) if zero else None)


def test_movement_belongs_to_the_domain_whose_actions_it_is(dictionary: Dictionary) -> None:
    a = loud()
    run = begun(Steering(two_domains(dictionary), [Action(LATE, "repel", "residual", 1.0, domain="shock")]))
    pass_through(run, a)
    assert of(run, "weapons")["status"] == "found, nothing moved"
    assert of(run, "shock")["status"] == "steered"

    run = begun(Steering(two_domains(dictionary, zero=True), [Action(LATE, "blend", "residual", 1.0)]))
    pass_through(run, a)
    assert of(run, "weapons")["status"] == "steered" and of(run, "weapons")["tokens_moved"] > 0
    assert of(run, "shock")["status"] == "found, nothing moved" and of(run, "shock")["tokens_moved"] == 0


@given(
    seed=st.integers(0, 10_000),
    operation=st.sampled_from(FORMS),
    domain=st.sampled_from(["", "weapons", "shock"]),
    strength=st.sampled_from([0.0, 1e-12, 1e-3, 1.0]),
    size=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    preserve_norm=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_tokens_moved_are_those_with_other_bits(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    operation: tuple[str, str],
    domain: str,
    strength: float,
    size: float,
    dtype: torch.dtype,
    preserve_norm: bool,
) -> None:
    made = two_domains(write_dictionary(tmp_path_factory.mktemp("d") / "d.safetensors", PLAN))
    plan = [Action(LATE, *operation, strength, domain=domain)]
    run = begun(Steering(made, plan, preserve_norm=preserve_norm), images=2)
    a = (size * loud(seed, images=2)).to(dtype)
    a[0, :2, 0] = -0.0
    out = pass_through(run, a)[LATE]
    width = torch.int32 if dtype == torch.float32 else torch.int16
    moved = (out.view(width) != a.view(width)).any(-1).sum(1).tolist()
    assert run.receipt()["tokens_moved"][1][0] == moved
    for image, tokens in enumerate(moved):
        own = {name: of(run, name, image)["tokens_moved"] for name in ("weapons", "shock")}
        assert max(own.values()) <= tokens <= sum(own.values())
        if domain:
            assert own == {name: tokens if name == domain else 0 for name in own}
    change = run.receipt()["relative_change"][1][0]
    assert [c > 0 for c in change] == [tokens > 0 for tokens in moved]


# what one domain does to another


def with_twin(dictionary: Dictionary, share: float) -> Dictionary:
    """`weapons` and `shock` have a feature each that fire alike; shock's adapter takes `share` of what Repel
    does for weapons back."""

    def twins(sae: SAE) -> SAE:
        rows = {n: getattr(sae, n).clone() for n in ("encoder_weight", "encoder_bias", "threshold")}
        for value in rows.values():
            value[3] = value[0]
        return replace(sae, **rows)

    made = rewritten(two_domains(dictionary), "twins.safetensors", lambda card: None, of_sae=twins)

    def change(card: Card) -> None:
        for feature, domain in ((0, card.domains["weapons"]), (3, card.domains["shock"])):
            domain.features = {p: [feature] for p in domain.features}
            domain.gate = Gate({LATE: told([feature])}, 0.0, 0.0, 10)

    def back(domain: str, delta: Tensor) -> Tensor:
        return share * made.sae(LATE).decoder_weight[0].expand(len(delta), -1).contiguous()

    return rewritten(made, f"twins-{share}.safetensors", change, back)


@pytest.mark.parametrize(("share", "expected"), [(0.0, "steered"), (0.3, "steered"), (1.0, UNDONE)])
def test_what_another_domain_undoes_is_not_steered(
    dictionary: Dictionary, share: float, expected: str
) -> None:
    """Its own change and what came out differ only by rounding: nothing that any file says of itself."""
    plan = [
        Action(LATE, "repel", "residual", 1.0, domain="weapons"),
        Action(LATE, "blend", "residual", 1.0, domain="shock"),
    ]
    run, a = begun(Steering(with_twin(dictionary, share), plan)), loud()
    out = pass_through(run, a)[LATE]
    found = of(run)
    assert found["left"] == pytest.approx(1 - share, abs=1e-4)
    if share == 1.0:
        torch.testing.assert_close(out, a, atol=1e-5, rtol=0)
        assert found["status"] in (expected, "found, nothing moved")
    else:
        assert found["status"] == expected and not torch.allclose(out, a, atol=1e-2)


@pytest.mark.parametrize(("share", "expected"), [(0.3, "steered"), (1.0, UNDONE)])
@pytest.mark.parametrize("undone_first", [False, True])
def test_what_another_dictionary_undoes_is_not_steered(
    dictionary: Dictionary, share: float, expected: str, undone_first: bool
) -> None:
    """Two runs in one sampling; what the second is given is what the first has made."""
    made = with_twin(dictionary, share)
    made = rewritten(made, f"apart-{share}.safetensors", lambda card: None, *APART)
    actions = {"weapons": "repel", "shock": "blend"}
    runs = {
        name: begun(Steering(made, [Action(LATE, operator, "residual", 1.0, domain=name)]))
        for name, operator in actions.items()
    }
    runs["weapons"].meet(runs["shock"])
    a = loud()
    for _ in range(2):
        out = a
        for name in sorted(runs, reverse=undone_first):
            out = pass_through(runs[name], out)[LATE]
        for run in runs.values():
            run.end_pass()
    found = of(runs["weapons"])
    assert found["left"] == pytest.approx(1 - share, abs=1e-3)
    assert found["status"] == expected
    assert torch.allclose(out, a, atol=1e-3) == (share == 1.0)


def test_a_domain_alone_keeps_all_of_its_change(dictionary: Dictionary) -> None:
    run = begun(Steering(dictionary, REPEL_LATE))
    pass_through(run, loud())
    assert of(run)["left"] == 1.0
    closed = begun(Steering(witness_only(dictionary, EARLY, NEVER), REPEL_LATE))
    pass_through(closed, loud())
    assert of(closed)["left"] is None


def test_many_one_row_adapters_take_the_room_of_their_rows(dictionary: Dictionary) -> None:
    names = tuple(f"d{i}" for i in range(MAX_DOMAINS))
    made = write_dictionary(
        dictionary.path.with_name("many.safetensors"), PLAN, domains=names, features=512, harmful=128
    )

    def change(card: Card) -> None:
        for d, domain in enumerate(card.domains.values()):
            domain.features = {p: [2 * d, 2 * d + 1] for p in domain.features}

    made = rewritten(made, "few.safetensors", change)
    site = Steering(made, PLAN).sites[LATE]
    assert sum(rows.numel() for _, rows in site.delta.values()) == 2 * MAX_DOMAINS * TINY.width
    plan = [Action(LATE, "blend", "paper", 1.0)]
    site = Steering(made, plan).sites[LATE]
    whole = site.reconstruct(loud(tokens=50))
    assert whole is not None and whole.code.shape == (1, 50, 128)  # once, not for each domain


# what the receipt says


@pytest.mark.parametrize(
    ("mode", "gated", "looked", "found", "moved", "expected"),
    [
        ("steer", True, 0, False, 0, "not looked at"),
        ("observe", True, 0, False, 0, "not looked at"),
        ("stop", True, 0, False, 0, "not looked at"),
        ("steer", False, 0, False, 0, "not looked at"),
        ("observe", True, 3, True, 0, "observed"),
        ("steer", True, 3, True, 2, "steered"),
        ("steer", True, 3, True, 0, "found, nothing moved"),
        ("stop", True, 3, True, 0, "found, nothing moved"),
        ("steer", True, 3, False, 0, "clear"),
        ("observe", True, 3, False, 0, "clear"),
        ("stop", True, 3, False, 0, "clear"),
        ("steer", True, 3, False, 2, "steered without evidence"),
        ("steer", True, 0, False, 2, "steered without evidence"),
        ("steer", False, 3, False, 2, "steered without evidence"),
        ("steer", False, 3, False, 0, "nothing moved"),
    ],
)
def test_status(mode: str, gated: bool, looked: int, found: bool, moved: int, expected: str) -> None:
    assert status(mode, gated, looked, found, moved) == expected


@pytest.mark.parametrize(
    ("found", "moved", "left", "expected"),
    [
        (True, 2, 0.49, UNDONE),
        (True, 2, -3.0, UNDONE),
        (False, 2, 0.0, UNDONE),
        (True, 2, 0.51, "steered"),
        (True, 0, 0.0, "found, nothing moved"),
        (False, 0, None, "clear"),
    ],
)
def test_status_of_what_others_undo(found: bool, moved: int, left: float | None, expected: str) -> None:
    assert status("steer", True, 3, found, moved, left) == expected


def test_a_domain_is_not_clear_while_one_of_its_witnesses_was_not_read(dictionary: Dictionary) -> None:
    gate = Gate({EARLY: told([0], (1.0, 0.7)), LATE: told([1], (0.5, 0.2))}, NEVER, 0.0, 1)
    run = begun(Steering(with_gate(dictionary, gate), REPEL_LATE), steps=2)
    pass_through(run, loud(), 0, 0.8)
    assert (of(run)["status"], of(run)["unread"]) == ("not looked at", [LATE])
    pass_through(run, loud(), 1, 0.3)
    assert (of(run)["status"], of(run)["unread"]) == ("clear", [])


@pytest.mark.parametrize("bare", [False, True], ids=["gated", "no gate"])
def test_what_was_never_looked_at_is_not_clear(dictionary: Dictionary, bare: bool) -> None:
    made = witness_only(dictionary, EARLY, 0.0, (0.5, 0.2))
    made = without_gates(made) if bare else made
    steering = Steering(made, [Action(LATE, "repel", "residual", 1.0, (0.5, 0.2))])
    for steps, sigmas in ((0, ()), (2, ()), (2, (1.0, 0.1))):
        run = begun(steering, steps=steps)
        for index, sigma in enumerate(sigmas):
            pass_through(run, loud(), index, sigma)
        found = of(run)
        assert (found["status"], found["looked"], found["evidence"]) == ("not looked at", 0, None)
    assert run.receipt()["calls"] == [[1, 1]] * (1 if bare else 2)


def test_a_plan_is_for_any_number_of_runs_at_a_time(dictionary: Dictionary) -> None:
    steering = Steering(witness_only(dictionary, EARLY, 0.0), PLAN)
    first, second = loud(1), loud(2)
    alone = [begun(steering), begun(steering)]
    expected = [pass_through(run, a) for run, a in zip(alone, (first, second), strict=True)]
    one, other = begun(steering), begun(steering)
    one.step(0, 0.8, slice(0, 1))
    other.step(0, 0.8, slice(0, 1))
    mixed = [(one(p, first), other(p, second)) for p in steering.positions]
    for p, (a, b) in zip(steering.positions, mixed, strict=True):
        assert same_bits(a, expected[0][p]) and same_bits(b, expected[1][p])
    assert [one.receipt(), other.receipt()] == [run.receipt() for run in alone]
    again = begun(steering)
    pass_through(again, first)
    assert again.receipt() == one.receipt()


def test_a_run_takes_sites_that_are_elsewhere(dictionary: Dictionary) -> None:
    steering = Steering(dictionary, REPEL_LATE)
    owned: list[Tensor] = []

    def own(t: Tensor) -> Tensor:
        owned.append(t.clone())
        return owned[-1]

    run = steering.run({position: site.map(own) for position, site in steering.sites.items()})
    run.begin(1, 1, torch.device("cpu"))
    for t in owned:
        t.zero_()  # its own, not copies: with nothing in them nothing moves
    a = loud()
    assert same_bits(pass_through(run, a)[LATE], a)
    assert of(run)["status"] == "clear"


def test_rows_that_are_not_the_images_are_refused(dictionary: Dictionary) -> None:
    run = begun(Steering(dictionary), images=2)
    with pytest.raises(ValueError, match=r"1 rows at double.0.img, in a run of 2 images"):
        pass_through(run, loud(images=1))


# what is refused


def without(dictionary: Dictionary, domain: str, position: str) -> Dictionary:
    """The dictionary, in which the domain has no features at a position."""

    def change(card: Card) -> None:
        found = card.domains[domain]
        found.features[position], found.gate = [], None

    return rewritten(dictionary, f"without-{domain}.safetensors", change)


@pytest.mark.parametrize("operator", ["blend", "repel"])
def test_an_action_that_can_never_act_is_refused(dictionary: Dictionary, operator: str) -> None:
    made = without(two_domains(dictionary), "shock", LATE)
    with pytest.raises(DictionaryError, match=f"nothing at {LATE} serves .* residual {operator} for shock"):
        Steering(made, [Action(LATE, operator, "residual", 1.0, domain="shock")])
    Steering(made, [Action(LATE, operator, "paper", 1.0, domain="shock")])  # acts on every token


@pytest.mark.parametrize("operator", ["blend", "repel"])
def test_a_domain_that_no_action_could_act_for_is_named(dictionary: Dictionary, operator: str) -> None:
    made = without(two_domains(dictionary), "shock", LATE)
    late, early = (Action(p, operator, "residual", 1.0) for p in (LATE, EARLY))
    with pytest.raises(DictionaryError, match=f"could never act for 'shock', .* nothing at {LATE}"):
        Steering(made, [late])
    Steering(made, [late, early])
    Steering(made, [Action(LATE, operator, "residual", 1.0, domain="weapons")])  # not meant for shock


def test_a_domain_that_is_only_observed_needs_no_action(dictionary: Dictionary) -> None:
    def change(card: Card) -> None:
        found = card.domains["shock"]
        found.features[LATE] = []
        found.gate = Gate({EARLY: told(found.features[EARLY])}, 0.0, 0.0, 10)

    made = rewritten(two_domains(dictionary), "observed.safetensors", change)
    run = begun(Steering(made, REPEL_LATE, modes={"shock": "observe"}))
    pass_through(run, loud())
    assert of(run, "shock")["status"] == "observed" and of(run, "weapons")["status"] == "steered"


def test_a_dictionary_without_domains_steers_nothing(dictionary: Dictionary) -> None:
    empty = rewritten(dictionary, "empty.safetensors", lambda card: (card.domains.clear(), card.plan.clear()))
    with pytest.raises(DictionaryError, match="residual repel for no domain"):
        Steering(empty, REPEL_LATE)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -0.5])
def test_a_strength_that_is_none_is_refused(dictionary: Dictionary, strength: float) -> None:
    with pytest.raises(ValueError, match="the strength is"):
        Steering(dictionary, strength=strength)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"scale": 1e-39}, 1.0),
        ({"weights": [1e-46] * 6}, 1.0),  # of which nothing is left
        ({"weights": [0.0] * 6}, 1.0),
        ({"offset": 1e30, "scale": 1e-20}, 1.0),
        ({}, 1e-39),
    ],
    ids=["witness's scale", "weights", "no weight", "offset", "SAE's scale"],
)
def test_numbers_that_overflow_together_are_refused(
    dictionary: Dictionary, changes: dict, scale: float
) -> None:
    """Each is finite and fits into its file; what steering makes of them doesn't."""

    def change(card: Card) -> None:
        gate = card.domains["weapons"].gate
        assert gate is not None
        gate.witnesses[EARLY] = replace(gate.witnesses[EARLY], **changes)

    def shrink(sae: SAE) -> SAE:
        return SAE(**vars(sae) | {"scale": torch.tensor(scale)})

    made = rewritten(dictionary, "odd.safetensors", change, of_sae=shrink)
    with pytest.raises(DictionaryError, match=f"at {EARLY}, .* weights and witness are too far apart"):
        Steering(made)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"weights": [1e30, -1e30]}, "what its witness makes of a feature"),
        ({"offset": 1e30}, "or its offset, is over"),
        ({"scale": 1e30}, "could never open"),
        ({"weights": [-1.0, -2.0]}, "could never open"),
        ({"offset": 9e5}, "could never open"),
        ({"window": (0.5, 0.5)}, "a window holds the noise level 0.5 alone"),
    ],
    ids=["weights", "offset", "scale", "no weight for it", "high offset", "window"],
)
def test_a_gate_that_could_never_tell_is_refused(dictionary: Dictionary, changes: dict, fault: str) -> None:
    made = with_gate(dictionary, Gate({EARLY: replace(told([0, 1]), **changes)}, 0.5, 0.0, 1))
    with pytest.raises(DictionaryError, match=f"gate.safetensors: .*'weapons'.*{fault}"):
        Steering(made)


def test_a_threshold_that_no_evidence_reaches_is_refused(dictionary: Dictionary) -> None:
    with pytest.raises(DictionaryError, match="the gate of 'weapons' could never open: it opens over 1e.30"):
        Steering(with_gate(dictionary, Gate({EARLY: told([0, 1])}, 1e30, 0.0, 1)))


@pytest.mark.parametrize("part", ["encoder_weight", "encoder_bias", "decoder_weight", "decoder_bias", "mean"])
def test_numbers_that_spoil_pictures_are_refused(dictionary: Dictionary, part: str) -> None:
    def spoil(sae: SAE) -> SAE:
        value = getattr(sae, part).clone()
        value[1] = 1e30
        return replace(sae, **{part: value})

    made = rewritten(dictionary, "odd.safetensors", lambda card: None, of_sae=spoil)
    with pytest.raises(DictionaryError, match=f"odd.safetensors: at {EARLY}"):
        Steering(made)


@pytest.mark.parametrize("form", ["residual", "paper"])
def test_an_adapter_that_spoils_pictures_is_refused_by_its_name(dictionary: Dictionary, form: str) -> None:
    found = Domain({LATE: [7]}, Gate({LATE: told([7])}, 0.0, 0.0, 10))
    plan = [Action(LATE, "blend", form, 1.0)]
    card = Card(TINY, domains={"shock": found}, plan=plan, base_sha256=dictionary.sha256)
    path = dictionary.path.with_name("shock.safetensors")
    save_adapter(path, card, {(LATE, "shock"): (torch.tensor([7]), torch.full((1, TINY.width), 1e30))})
    merged = dictionary.with_adapters(path)
    with pytest.raises(DictionaryError, match=f"shock.safetensors: at {LATE}, of domain 'shock', a feature"):
        Steering(merged, [Action(LATE, "blend", form, 1.0, domain="shock")])


@pytest.mark.parametrize("gated", [False, True])
def test_paper_blend_encodes_once_for_all_domains(
    dictionary: Dictionary, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    encode = SAE.encode

    def count(self: SAE, a: Tensor) -> Tensor:
        asked.append(1)
        return encode(self, a)

    names = ("weapons", "shock", "fraud")
    made = write_dictionary(dictionary.path.with_name("three.safetensors"), PLAN, domains=names)
    monkeypatch.setattr(SAE, "encode", count)
    a = loud()
    plan = [Action(LATE, "blend", "paper", 0.2, domain=name) for name in names]
    run = begun(Steering(made if gated else without_gates(made), plan))
    out = pass_through(run, a)[LATE]
    assert len(asked) == 1
    sae = made.sae(LATE)
    expected = a.clone()
    for name in names:
        rows, delta = made.delta(LATE, name) or pytest.fail("no adapter")
        decoder = sae.decoder_weight.clone()
        decoder[rows] += delta
        expected += 0.2 * (SAE(**vars(sae) | {"decoder_weight": decoder}).reconstruct(a) - a)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert all(of(run, name)["tokens_moved"] == 10 for name in names)
