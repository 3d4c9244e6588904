"""Operators, gate and exact no-ops, on the plain tensors that a host would pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from safedig_core.dictionary.dictionary import Action, Card, Dictionary, Gate, Witness, save_dictionary
from safedig_core.steering.gate import evidence_of
from safedig_core.steering.steering import RiskFound, Run, Steering
from tests.tiny import TINY, TinyHost, random_sae, rewritten, write_dictionary

POSITION = "double.1.img"
FORMS = [("repel", "residual"), ("blend", "residual"), ("repel", "paper"), ("blend", "paper")]


def steering(folder: Path, operator="repel", form="residual", strength=1.0, window=(1.0, 0.0), **options):
    write = {k: options.pop(k) for k in ("threshold", "domains") if k in options}
    plan = [Action(POSITION, operator, form, strength, window)]
    return Steering(write_dictionary(folder / "d.safetensors", plan, **write), **options)


def activation(seed: int = 0, images: int = 3, tokens: int = 10) -> torch.Tensor:
    return 2 * torch.randn(images, tokens, TINY.width, generator=torch.Generator().manual_seed(seed))


def begun(s: Steering, images: int, steps: int = 1) -> Run:
    run = s.run()
    run.begin(images, steps, torch.device("cpu"))
    return run


def ran(s: Steering, a: torch.Tensor, sigma: float = 0.8, rows: slice | None = None):
    """The activation after one call at the first of four steps, and the run."""
    rows = rows or slice(0, len(a))
    run = begun(s, len(a[rows]), 4)
    run.step(0, sigma, rows)
    return run(POSITION, a), run


def applied(s: Steering, a: torch.Tensor, sigma: float = 0.8, rows: slice | None = None) -> torch.Tensor:
    return ran(s, a, sigma, rows)[0]


@given(seed=st.integers(0, 10_000), features=st.integers(2, 40), width=st.integers(2, 48))
@settings(max_examples=40, deadline=None)
def test_rows_of_an_sae_give_the_dense_result(seed: int, features: int, width: int) -> None:
    sae = random_sae(features, width, seed)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(features, generator=g) < 0.4
    a = torch.randn(5, width, generator=g, dtype=torch.float64)
    sae = sae.to(torch.float64)
    dense = sae.encode(a) * mask
    few = sae.rows(mask.nonzero().flatten())
    assert torch.allclose(few.encode(a), dense[:, mask], atol=1e-12)
    assert torch.allclose(few.encode(a) @ few.decoder_weight, dense @ sae.decoder_weight, atol=1e-12)


@pytest.mark.parametrize(("operator", "form"), FORMS)
def test_operators_match_their_equations(tmp_path: Path, operator: str, form: str) -> None:
    s = steering(tmp_path, operator, form, 0.7)
    a, d = activation(), s.dictionary
    sae = d.sae(POSITION)
    rows, delta = d.delta(POSITION, "weapons") or pytest.fail("no adapter")
    z = sae.encode(a)
    masked = torch.zeros_like(z)
    masked[..., rows] = z[..., rows]
    transferred = sae.decoder_weight.clone()
    transferred[rows] += delta
    expected = {
        ("repel", "residual"): a - 0.7 * sae.scale * masked @ sae.decoder_weight,
        ("blend", "residual"): a + 0.7 * sae.scale * z[..., rows] @ delta,
        ("repel", "paper"): a - 0.7 * (sae.decode(masked) - a),
        ("blend", "paper"): 0.3 * a + 0.7 * (sae.scale * (z @ transferred + sae.decoder_bias) + sae.mean),
    }[operator, form]
    assert torch.allclose(applied(s, a), expected, atol=1e-4)


@pytest.mark.parametrize(("operator", "form"), FORMS)
@pytest.mark.parametrize(
    "change",
    [{"strength": 0.0}, {"window": (0.5, 0.2)}, {"threshold": 1e4}, {"modes": {"weapons": "observe"}}],
    ids=["strength 0", "outside the window", "gate closed", "observe"],
)
def test_no_ops_keep_every_bit(tmp_path: Path, operator: str, form: str, change: dict) -> None:
    a = activation()
    a[0, 0, 0] = -0.0
    out = applied(steering(tmp_path, operator, form, **change), a)
    assert torch.equal(out.view(torch.int32), a.view(torch.int32))


@given(seed=st.integers(0, 10_000), operator=st.sampled_from(["repel", "blend"]))
@settings(max_examples=25, deadline=None)
def test_residual_form_moves_only_tokens_that_fire(tmp_path_factory, seed: int, operator: str) -> None:
    s = steering(tmp_path_factory.mktemp("d"), operator)
    a = activation(seed) * 0.6
    out = applied(s, a)
    z = s.dictionary.needed(POSITION, ["weapons"])[1].encode(a)
    quiet = ~(z > 0).any(-1)
    assert torch.equal(out[quiet], a[quiet])
    assert not torch.equal(out, a) or bool(quiet.all())


def test_only_the_given_rows_are_steered(tmp_path: Path) -> None:
    a = activation(images=4)
    out = applied(steering(tmp_path), a, rows=slice(2, 4))
    assert torch.equal(out[:2], a[:2])
    assert not torch.equal(out[2:], a[2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32_and_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    s, a = steering(tmp_path), activation().to(dtype)
    out = applied(s, a)
    assert out.dtype == dtype
    assert torch.allclose(out.float(), applied(s, a.float()), rtol=1e-2, atol=5e-2)


def test_an_open_gate_stays_open_and_is_per_image(tmp_path: Path) -> None:
    loud, quiet = activation(images=1), torch.zeros(1, 10, TINY.width)
    s = steering(tmp_path)
    site = s.sites[POSITION]
    evidence = [evidence_of(site, site.code(a), POSITION).item() for a in (loud, quiet)]
    assert evidence[0] > evidence[1]
    s = steering(tmp_path, threshold=sum(evidence) / 2)
    both = torch.cat([loud, quiet])
    run = begun(s, 2, steps=2)
    run.step(0, 1.0, slice(0, 2))
    first = run(POSITION, both)
    assert not torch.equal(first[0], both[0])
    assert torch.equal(first[1], both[1])
    run.step(1, 0.9, slice(0, 2))
    run(POSITION, torch.cat([quiet, quiet]))
    found = [image["weapons"] for image in run.receipt()["images"]]
    assert [image["found_at_step"] for image in found] == [0, None]
    assert found[0]["evidence"] == pytest.approx(evidence[0])


def test_stop_ends_the_run_with_a_verdict(tmp_path: Path) -> None:
    s = steering(tmp_path, modes={"weapons": "stop"})
    with pytest.raises(RiskFound, match=r"weapons found in picture .* at step 1 "):
        applied(s, activation())


def test_shared_features_are_repelled_once(tmp_path: Path) -> None:
    a = activation()
    one = applied(steering(tmp_path), a)
    two = applied(steering(tmp_path, domains=("weapons", "substances")), a)
    assert torch.allclose(one, two, atol=1e-6)


def test_preserve_norm_keeps_token_norms(tmp_path: Path) -> None:
    a = activation()
    out = applied(steering(tmp_path, preserve_norm=True), a)
    assert not torch.equal(out, a)
    assert torch.allclose(out.norm(dim=-1), a.norm(dim=-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": {"knitting": "steer"}}, "no domain 'knitting'"),
        ({"modes": {"weapons": "maybe"}}, "unknown mode 'maybe'"),
        ({"plan": [Action("double.7.img", "repel", "residual", 1.0)]}, "no position 'double.7.img'"),
        ({"plan": [Action("double.0.img", "repel", "residual", 1.0)]}, "double.0.img"),
    ],
)
def test_bad_options_are_refused_in_words(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steering(tmp_path, **options)


def test_receipt_counts_calls_and_tokens(tmp_path: Path) -> None:
    a = activation()
    out, run = ran(steering(tmp_path), a)
    receipt = run.receipt()
    assert receipt["positions"] == receipt["acting"] == receipt["witnesses"]["weapons"] == [POSITION]
    assert receipt["calls"] == [[1, 0, 0, 0]]
    moved = (out != a).any(-1).sum(1).tolist()
    assert receipt["tokens_moved"][0][0] == moved
    assert [image["weapons"]["tokens_moved"] for image in receipt["images"]] == moved
    assert all(change > 0 for change, n in zip(receipt["relative_change"][0][0], moved, strict=True) if n)


# properties, over activations, forms, dtypes and batches


@pytest.fixture(scope="module")
def two_domains(tmp_path_factory: pytest.TempPathFactory) -> Dictionary:
    """Domains that share no feature: `weapons` has 0-2, `substances` 3-5."""
    folder = tmp_path_factory.mktemp("two")
    plan = [Action(POSITION, "repel", "residual", 1.0)]
    card = write_dictionary(folder / "d.safetensors", plan, domains=("weapons", "substances")).card
    delta = torch.randn(6, TINY.width, generator=torch.Generator().manual_seed(3))
    adapters = {}
    for d, (name, domain) in enumerate(card.domains.items()):
        domain.features, domain.gate = {POSITION: list(range(3 * d, 3 * d + 3))}, None
        adapters[POSITION, name] = (torch.arange(6), delta)  # of the other domain's rows as well
    save_dictionary(folder / "d.safetensors", card, {POSITION: random_sae(24, TINY.width)}, adapters)
    return Dictionary.open(folder / "d.safetensors")


@pytest.fixture(scope="module")
def gated(two_domains: Dictionary) -> Dictionary:
    """`two_domains` with gates that nothing opens."""

    def add(card: Card) -> None:
        for domain in card.domains.values():
            mine = domain.features[POSITION]
            witness = Witness(mine, [1.0] * len(mine), 0.0, 1.0, (1.0, 0.0))
            domain.gate = Gate({POSITION: witness}, 1e4, 0.0, 10)

    return rewritten(two_domains, "gated.safetensors", add)


ACTIVATION = st.builds(
    lambda seed, size, dtype: (size * activation(seed)).to(dtype),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.3, 1.0, 100.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
OPERATION = st.sampled_from(FORMS)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@given(
    a=ACTIVATION,
    operation=OPERATION,
    reason=st.sampled_from(["strength", "multiplier", "window", "gate", "observe"]),
    sigma=st.floats(0, 1),
    on_device=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_nothing_to_do_keeps_every_bit(
    two_domains: Dictionary,
    gated: Dictionary,
    a: torch.Tensor,
    operation: tuple[str, str],
    reason: str,
    sigma: float,
    on_device: bool,
) -> None:
    a.view(-1)[:2] = -0.0
    window = (1.0, 0.0)
    if reason == "window":
        window = (1.0, 0.9) if sigma < 0.9 else (0.5, 0.0)
    strength = 0.0 if reason == "strength" else 1.0
    s = Steering(
        gated if reason in ("gate", "observe") else two_domains,
        [Action(POSITION, *operation, strength, window)],
        strength=0.0 if reason == "multiplier" else 1.0,
        modes=dict.fromkeys(("weapons", "substances"), "observe") if reason == "observe" else None,
    )
    run = begun(s, len(a))
    run.step(0, torch.tensor(sigma) if on_device else sigma, slice(0, len(a)))
    assert same_bits(run(POSITION, a), a)


@given(a=ACTIVATION, operation=OPERATION, start=st.integers(0, 3), stop=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_other_rows_of_the_batch_keep_every_bit(
    two_domains: Dictionary, a: torch.Tensor, operation: tuple[str, str], start: int, stop: int
) -> None:
    s = Steering(two_domains, [Action(POSITION, *operation, 1.0)])
    out = applied(s, a, rows=slice(start, stop))
    others = [i for i in range(len(a)) if not start <= i < stop]
    assert same_bits(out[others], a[others])
    alone = applied(s, a[start:stop])
    assert torch.allclose(out[start:stop].float(), alone.float(), rtol=1e-2, atol=1e-4)


@given(
    seed=st.integers(0, 10_000),
    operator=st.sampled_from(["repel", "blend"]),
    domain=st.sampled_from(["", "weapons", "substances"]),
    strength=st.floats(0.1, 5),
)
@settings(max_examples=60, deadline=None)
def test_residual_steering_by_rows_is_the_dense_operator(
    two_domains: Dictionary, seed: int, operator: str, domain: str, strength: float
) -> None:
    """Masks, shared strengths and one domain's actions, against the equation on the whole SAE."""
    a = activation(seed)
    out = applied(Steering(two_domains, [Action(POSITION, operator, "residual", strength, domain=domain)]), a)
    sae = two_domains.sae(POSITION)
    mask = torch.zeros(24)
    for name in [domain] if domain else ["weapons", "substances"]:
        mask[two_domains.card.domains[name].features[POSITION]] = 1
    z = sae.encode(a) * mask
    rows = -sae.decoder_weight
    if operator == "blend":
        _, rows = two_domains.delta(POSITION, "weapons") or pytest.fail("no adapter")
        rows = torch.cat([rows, torch.zeros(18, TINY.width)])
    assert torch.allclose(out, a + strength * sae.scale * z @ rows, rtol=1e-4, atol=1e-3)
    quiet = ~(z > 0).any(-1)
    assert same_bits(out[quiet], a[quiet])


def test_a_domain_without_a_gate_is_always_steered(two_domains: Dictionary) -> None:
    out, run = ran(Steering(two_domains, [Action(POSITION, "repel", "residual", 1.0)]), activation())
    assert not torch.equal(out, activation())
    found = run.receipt()["images"][0]["weapons"]
    assert found["threshold"] is None and found["evidence"] is None and found["found_at_step"] is None
    assert found["status"] == "steered without evidence"


def test_without_positions_the_image_is_bit_identical(two_domains: Dictionary, tiny_flux: nn.Module) -> None:
    host = TinyHost(tiny_flux)
    plain = host.sample(["a cat", "a pistol"], [0, 1])
    for plan in ([], [Action(POSITION, "repel", "residual", 0.0)]):
        assert same_bits(host.sample(["a cat", "a pistol"], [0, 1], Steering(two_domains, plan).run()), plain)
    plan = [Action(POSITION, "repel", "residual", 1.0)]
    assert not same_bits(host.sample(["a cat", "a pistol"], [0, 1], Steering(two_domains, plan).run()), plain)
