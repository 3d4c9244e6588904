"""Several domains in one dictionary: what they do together, and where they get in each other's way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safedig_core.dictionary.conflicts import conflicts, losses
from safedig_core.dictionary.dictionary import (
    Action,
    Card,
    Dictionary,
    DictionaryError,
    Domain,
    Gate,
    Witness,
    save_adapter,
)
from safedig_core.steering.steering import Steering
from tests.tiny import TINY, write_dictionary

AT = "double.1.img"
BLEND, REPEL = (Action(AT, operator, "residual", 1.0, domain="weapons") for operator in ("blend", "repel"))


def adapter(
    base: Dictionary,
    domain: str,
    rows: list[int],
    delta: torch.Tensor,
    operators: tuple[str, ...] = ("blend",),
) -> Path:
    path = base.path.with_name(f"{domain}.safetensors")
    gate = Gate({AT: Witness(rows, [1.0] * len(rows), 0.0, 1.0, (1.0, 0.0))}, 0.0, 0.0, 10)
    card = Card(
        TINY,
        domains={domain: Domain({AT: rows}, gate)},
        plan=[Action(AT, operator, "residual", 1.0, domain=domain) for operator in operators],
        base_sha256=base.sha256,
    )
    save_adapter(path, card, {(AT, domain): (torch.tensor(rows), delta)})
    return path


@pytest.fixture
def base(tmp_path: Path) -> Dictionary:
    return write_dictionary(tmp_path / "base.safetensors", [BLEND, REPEL])


def own(base: Dictionary, rows: list[int]) -> torch.Tensor:
    found = base.delta(AT, "weapons")
    assert found is not None
    return found[1][rows]


def test_domains_apart_do_not_conflict(base: Dictionary) -> None:
    rows = [10, 11]  # weapons has features 0 to 5
    both = base.with_adapters(adapter(base, "shock", rows, torch.ones(2, TINY.width)))
    assert conflicts(base) == conflicts(both) == []


def test_domains_that_agree_on_shared_features_do_not_conflict(base: Dictionary) -> None:
    both = base.with_adapters(
        adapter(base, "shock", [1, 2, 11], torch.cat([own(base, [1, 2]), torch.ones(1, 32)]))
    )
    assert conflicts(both) == []


def test_opposed_changes_of_shared_features_are_reported(tmp_path: Path) -> None:
    """weapons has six features, of which shock takes the changes of two back."""
    base = write_dictionary(tmp_path / "blend.safetensors", [BLEND])
    whole, two = own(base, list(range(6))), own(base, [1, 2])
    left = 1 - (two.square().sum() / whole.square().sum()).item()
    both = base.with_adapters(adapter(base, "shock", [1, 2], -two))
    mine = [text for text in conflicts(both) if "for 'weapons'" in text]
    assert mine == [
        f"at {AT}, {left:.0%} of what Blend does for 'weapons' is left where all domains are found: "
        "'shock' works against it"
    ]


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_an_adapter_that_works_against_its_bases_repel_is_reported(base: Dictionary, share: float) -> None:
    back = share * base.sae(AT).decoder_weight[:6]
    plain = base.with_adapters(adapter(base, "shock", list(range(6)), back))
    plan = [REPEL, replace(BLEND, domain="shock")]
    (loss,) = [loss for loss in losses(plain, plan) if loss.domain == "weapons"]
    assert (loss.position, loss.operator, loss.culprit) == (AT, "repel", "shock")
    assert loss.left == pytest.approx(1 - share, abs=1e-5)
    assert losses(plain, plan, {"shock": 0.0}) == []
    if share == 1.0:
        with pytest.raises(DictionaryError, match="shock.safetensors: .* 0% of what Repel does"):
            Steering(plain, plan)
        Steering(plain, plan, modes={"shock": "observe"})


def test_two_adapters_that_undo_it_together_are_refused(base: Dictionary) -> None:
    """Also where the base repels the same features for two domains: that is done once."""
    back = 0.45 * base.sae(AT).decoder_weight[:6]
    paths = [adapter(base, name, list(range(6)), back) for name in ("shock", "fraud")]
    plan = [REPEL, *(replace(BLEND, domain=name) for name in ("shock", "fraud"))]
    Steering(base.with_adapters(paths[0]), plan[:2])
    for repel in (REPEL, replace(REPEL, domain="")):
        with pytest.raises(DictionaryError, match="of what Repel does for 'weapons'"):
            Steering(base.with_adapters(*paths), [repel, *plan[1:]])


def test_actions_of_an_adapter_that_the_plan_already_has_are_reported(tmp_path: Path) -> None:
    base = write_dictionary(tmp_path / "all.safetensors", [replace(REPEL, domain="")])
    path = adapter(base, "shock", [10], torch.ones(1, TINY.width), ("repel", "blend"))
    both = base.with_adapters(path)
    assert conflicts(both) == [
        f"the plan already has a repel at {AT} for all domains: that of 'shock' is left out"
    ]


def test_domains_add_up_and_can_be_swapped_without_reading_the_dictionary_again(base: Dictionary) -> None:
    """With all gates open, blending two domains moves an activation by the sum of both moves."""
    a = torch.randn(1, 7, TINY.width, generator=torch.Generator().manual_seed(3))
    shock = adapter(base, "shock", [0, 10], torch.ones(2, TINY.width))
    fraud = adapter(base, "fraud", [3, 12], -2 * torch.ones(2, TINY.width))

    def move(dictionary: Dictionary, only: tuple[str, ...]) -> torch.Tensor:
        modes = {domain: "steer" if domain in only else "observe" for domain in dictionary.card.domains}
        plan = [action for action in dictionary.card.plan if action.operator == "blend"]
        run = Steering(dictionary, plan, modes=modes, gate=False).run()
        run.begin(1, 1, torch.device("cpu"))
        run.step(0, 0.5, slice(0, 1))
        return run(AT, a) - a

    both = base.with_adapters(shock, fraud)
    parts = {domain: move(both, (domain,)) for domain in ("weapons", "shock", "fraud")}
    assert all(part.any() for part in parts.values())
    torch.testing.assert_close(move(both, tuple(parts)), sum(parts.values()), atol=1e-5, rtol=0)
    for path, domain in ((shock, "shock"), (fraud, "fraud")):  # swapped on the one open dictionary
        swapped = base.with_adapters(path)
        assert swapped.needed(AT, [domain])[0] != base.needed(AT, ["weapons"])[0]
        torch.testing.assert_close(move(swapped, (domain,)), parts[domain], atol=1e-6, rtol=0)
