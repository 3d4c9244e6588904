"""The dictionary file: what is saved comes back, and nothing malformed gets in."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safedig_core.dictionary import card as card_module
from safedig_core.dictionary import dictionary as dictionary_module
from safedig_core.dictionary.card import MAX_DOMAINS, MAX_PLAN
from safedig_core.dictionary.dictionary import (
    Action,
    Card,
    Dictionary,
    DictionaryError,
    Domain,
    Gate,
    PositionInfo,
    Witness,
    check,
    save_adapter,
    save_dictionary,
)
from safedig_core.positions import Architecture
from safedig_core.sae import SAE
from safedig_core.tensors import MAX_HEADER

ARCHITECTURE = Architecture("flux", (1, 1), 6, 4)
FEATURES = {"text": 8, "single.0.img": 12}
PREFIX = {"text": 3, "single.0.img": 5}
FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def make_sae(position: str, dtype: torch.dtype = torch.float32) -> SAE:
    count, width = FEATURES[position], ARCHITECTURE.width_of(position)
    g = torch.Generator().manual_seed(count)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    sae = SAE(
        draw(count, width),
        draw(count),
        draw(count).abs(),
        draw(count, width),
        draw(width),
        draw(width),
        draw(1)[0].abs() + 1,
    )
    return sae.to(dtype)


TOLD = Witness([0], [1.0], 0.0, 1.0, (1.0, 0.0))


def make_card() -> Card:
    witnesses = {
        "text": Witness([1, 2], [1.0, -0.5], 0.25, 2.0, (1.0, 0.0)),
        "single.0.img": Witness([2, 4, 0], [0.1, 2.0, -3.0], -1.5, 0.5, (0.9, 0.5)),
    }
    gate = Gate(witnesses, 1.25, 0.01, 300, {"name": (3, 250), "near-risk": (0, 50)})
    domains = {
        "weapons": Domain({"text": [0, 2], "single.0.img": [4, 0, 1]}, gate),
        "substances": Domain({"single.0.img": [3, 4]}),
    }
    return Card(
        ARCHITECTURE,
        {p: PositionInfo(PREFIX[p], {"fvu": 0.1, "l0": 8.5, "dead": 0.0}) for p in FEATURES},
        domains,
        [Action("single.0.img", "repel", "residual", 1.5, (1.0, 0.2), {"semantic": 0.7}, "weapons")],
        {"seed": 0, "steps": [1, 2, None, True], "lr": 1e-3},
        {"data": "MIT", "weights": "Apache-2.0"},
        "Ada Lovelace",
        "武器 dictionary",
        "0" * 64,
    )


def make_adapters() -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    rows = torch.tensor([1, 3, 11])
    return {("single.0.img", "substances"): (rows, torch.arange(18.0).reshape(3, 6))}


def make_adapter_card(base: str) -> Card:
    told = {"text": replace(TOLD, features=[5])}
    domain = Domain({"single.0.img": [1, 7, 8, 11]}, Gate(told, 0.5, 0.0, 10))
    plan = [
        Action("single.0.img", "repel", "paper", 9.0),
        Action("single.0.img", "blend", "residual", 1.0, domain="shock"),
    ]
    return Card(ARCHITECTURE, {}, {"shock": domain}, plan, base_sha256=base)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "test.safetensors"
    save_dictionary(path, make_card(), {p: make_sae(p) for p in FEATURES}, make_adapters())
    return path


@pytest.fixture
def adapter(path: Path) -> Path:
    return write_adapter(path, make_adapter_card(Dictionary.open(path).sha256))


def write_adapter(base: Path, card: Card) -> Path:
    path = base.with_name("shock.safetensors")
    delta = torch.ones(2, 6, dtype=torch.bfloat16)
    save_adapter(path, card, {("single.0.img", "shock"): (torch.tensor([7, 11], dtype=torch.int32), delta)})
    return path


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(SAE))


DROP = object()


class Rename(str):
    """A key's new name."""


def change(root: Any, where: str, value: object) -> None:
    """Sets, drops or renames one entry in parsed JSON; `where`: keys with spaces between."""
    *above, last = (int(key) if key.isdigit() else key for key in where.split())
    for key in above:
        root = root[key]
    if value is DROP:
        del root[last]
    elif isinstance(value, Rename):
        root[str(value)] = root.pop(last)
    else:
        root[last] = value


def split(raw: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: dict | str | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    encoded = text if isinstance(text, bytes) else text.encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + data


def use(path: Path) -> None:
    """Everything that reads a file."""
    check(path)
    dictionary = Dictionary.open(path)
    for position in dictionary.card.positions:
        dictionary.sae(position)
        dictionary.needed(position, list(dictionary.card.domains))
        for domain in dictionary.card.domains:
            dictionary.delta(position, domain)


def refused(path: Path, match: str | None = None) -> str:
    with pytest.raises(DictionaryError, match=match) as caught:
        use(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# what is saved comes back


def test_round_trip(path: Path) -> None:
    dictionary = Dictionary.open(path)
    assert dictionary.card == check(path) == make_card()
    assert Card.from_json(json.loads(json.dumps(dictionary.card.to_json()))) == make_card()
    assert Card.from_json(dictionary.card.to_json()) == make_card()
    for position in FEATURES:
        assert same(dictionary.sae(position), make_sae(position))
    rows, delta = dictionary.delta("single.0.img", "substances") or pytest.fail("no adapter")
    assert rows.dtype == torch.int64 and rows.tolist() == [1, 3, 11]
    assert torch.equal(delta, torch.arange(18.0).reshape(3, 6))
    assert dictionary.delta("single.0.img", "weapons") is None
    assert dictionary.delta("text", "substances") is None


def test_the_metadata_is_as_specified(path: Path) -> None:
    header, _ = split(path.read_bytes())
    assert set(header["__metadata__"]) == {"safedig"}
    card = json.loads(header["__metadata__"]["safedig"])
    assert card.pop("format") == 3 and card.pop("kind") == "dictionary"
    assert set(card) == {
        *("architecture", "positions", "domains", "plan", "training"),
        *("licence", "creator", "title", "source_sha256"),
    }
    assert card["plan"] == [
        {
            "position": "single.0.img",
            "operator": "repel",
            "form": "residual",
            "strength": 1.5,
            "window": [1.0, 0.2],
            "score": {"semantic": 0.7},
            "domain": "weapons",
        }
    ]


def test_others_may_read_what_was_saved_as_any_new_file(path: Path) -> None:
    plain = path.with_name("plain")
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_same_input_gives_same_bytes(path: Path) -> None:
    again = path.with_name("again.safetensors")
    saes = {p: make_sae(p) for p in reversed(FEATURES)}
    save_dictionary(again, make_card(), saes, make_adapters())
    assert again.read_bytes() == path.read_bytes()
    assert Dictionary.open(again).sha256 == Dictionary.open(path).sha256
    assert sorted(p.name for p in path.parent.iterdir()) == ["again.safetensors", "test.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(path: Path, dtype: torch.dtype) -> None:
    save_dictionary(path, make_card(), {p: make_sae(p, dtype) for p in FEATURES})
    sae = Dictionary.open(path).sae("text")
    assert sae.mean.dtype == torch.float32 and same(sae, make_sae("text", dtype).to(torch.float32))


@pytest.mark.parametrize("domains", [["weapons"], ["substances"], ["weapons", "substances"], []])
@pytest.mark.parametrize("position", FEATURES)
def test_needed_rows_are_those_of_the_whole(path: Path, position: str, domains: list[str]) -> None:
    """Those that act and those that tell, each once."""
    indices, sae = Dictionary.open(path).needed(position, domains)
    expected = {
        ("text", "weapons"): {0, 1, 2},
        ("single.0.img", "weapons"): {0, 1, 2, 4},
        ("single.0.img", "substances"): {3, 4},
    }
    assert indices == sorted({i for d in domains for i in expected.get((position, d), ())})
    assert same(sae, make_sae(position).rows(torch.tensor(indices, dtype=torch.int64)))


def test_views_and_shared_storage_are_saved(path: Path) -> None:
    whole = make_sae("single.0.img")
    rows = whole.rows(slice(0, 8))
    shared = SAE(
        rows.encoder_weight[:, :4],
        rows.threshold,
        rows.threshold,
        rows.encoder_weight[:, 2:],
        rows.mean[:4],
        rows.mean[:4],
        rows.scale,
    )
    save_dictionary(path, make_card(), {"text": shared, "single.0.img": whole})
    assert same(Dictionary.open(path).sae("text"), shared)


def test_check_reads_in_chunks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safedig_core.dictionary.dictionary.CHUNK", 13)
    assert check(path) == make_card()
    header, data = split(path.read_bytes())
    _, stop = header["single.0.img/decoder.weight"]["data_offsets"]
    broken = bytearray(data)
    broken[stop - 4 : stop] = b"\x00\x00\xc0\x7f"
    path.write_bytes(join(header, bytes(broken)))
    refused(path, "single.0.img/decoder.weight has numbers that are not finite")


def test_an_empty_adapter(path: Path) -> None:
    empty = {("text", "weapons"): (torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))}
    save_dictionary(path, make_card(), {p: make_sae(p) for p in FEATURES}, empty)
    use(path)
    rows, delta = Dictionary.open(path).delta("text", "weapons") or pytest.fail("no adapter")
    assert rows.shape == (0,) and delta.shape == (0, 4)


# adapters


def test_adapter_merges(path: Path, adapter: Path) -> None:
    base = Dictionary.open(path)
    merged = base.with_adapters(adapter)
    assert set(base.card.domains) == {"weapons", "substances"}
    assert set(merged.card.domains) == {"weapons", "substances", "shock"}
    assert [(a.operator, a.strength, a.domain) for a in merged.card.plan] == [
        ("repel", 1.5, "weapons"),
        ("repel", 9.0, "shock"),  # in its file for all domains, which are but its own
        ("blend", 1.0, "shock"),
    ]
    assert merged.sha256 == base.sha256 and merged.path == base.path
    assert check(adapter) == make_adapter_card(base.sha256)

    indices, sae = merged.needed("single.0.img", ["substances", "shock"])
    assert indices == [1, 3, 4, 7, 8, 11]
    assert merged.needed("text", ["substances", "shock"])[0] == [5]  # tells only
    assert same(sae, make_sae("single.0.img").rows(torch.tensor(indices)))
    rows, delta = merged.delta("single.0.img", "shock") or pytest.fail("no adapter")
    assert rows.dtype == torch.int64 and rows.tolist() == [7, 11]
    assert delta.dtype == torch.float32 and torch.equal(delta, torch.ones(2, 6))
    assert merged.delta("single.0.img", "substances") is not None


def test_a_plan_for_all_domains_covers_an_adapters(path: Path) -> None:
    card = make_card()
    card.plan = [Action("single.0.img", "blend", "residual", 2.0)]
    save_dictionary(path, card, {p: make_sae(p) for p in FEATURES}, make_adapters())
    base = Dictionary.open(path)
    merged = base.with_adapters(write_adapter(path, make_adapter_card(base.sha256)))
    assert [(a.operator, a.strength, a.domain) for a in merged.card.plan] == [
        ("blend", 2.0, ""),
        ("repel", 9.0, "shock"),
    ]


def test_other_domains_on_the_card_leave_all_else_as_it_is(path: Path, adapter: Path) -> None:
    gated = Dictionary.open(path).with_adapters(adapter)
    bare = gated.with_domains({name: replace(d, gate=None) for name, d in gated.card.domains.items()})
    assert gated.card.domains["weapons"].gate and not any(d.gate for d in bare.card.domains.values())
    assert bare.needed("text", ["weapons"])[0] == [0, 2] and gated.needed("text", ["weapons"])[0] == [0, 1, 2]
    assert bare.delta("single.0.img", "shock") is not None and bare.card.plan == gated.card.plan
    assert bare.sha256 == gated.sha256


def test_adapter_clash(path: Path, adapter: Path) -> None:
    merged = Dictionary.open(path).with_adapters(adapter)
    for attempt in (lambda: merged.with_adapters(adapter), lambda: merged.with_adapters(adapter, adapter)):
        with pytest.raises(DictionaryError, match="already has domain 'shock'") as caught:
            attempt()
        assert str(adapter) in str(caught.value)


def test_more_adapters_than_anyone_has(path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_module, "MAX_DOMAINS", 2)
    with pytest.raises(DictionaryError, match=r"it has 3 domains, and 2 is the most. Choose fewer") as caught:
        Dictionary.open(path).with_adapters(adapter)
    assert str(adapter) in str(caught.value)


def test_adapter_of_another_file(path: Path, adapter: Path) -> None:
    card = make_card()
    card.title = "another"
    old = Dictionary.open(path).sha256
    save_dictionary(path, card, {p: make_sae(p) for p in FEATURES})
    base = Dictionary.open(path)
    with pytest.raises(DictionaryError) as caught:
        base.with_adapters(adapter)
    assert all(part in str(caught.value) for part in (str(adapter), old, base.sha256))


def test_adapter_beyond_its_base(path: Path, adapter: Path) -> None:
    card = make_adapter_card(Dictionary.open(path).sha256)
    beyond, nowhere = (
        Gate({position: Witness([feature], [1.0], 0.0, 1.0, (1.0, 0.0))}, 0.0, 0.0, 10)
        for position, feature in (("text", 8), ("double.0.img", 0))
    )
    for domain in (
        Domain({"single.0.img": [12]}),
        Domain({"double.0.img": []}),
        Domain({}, beyond),
        Domain({}, nowhere),
    ):
        card.domains = {"shock": domain}
        write_adapter(path, card)
        with pytest.raises(DictionaryError, match="shock.safetensors"):
            Dictionary.open(path).with_adapters(adapter)
    save_adapter(
        adapter,
        make_adapter_card(card.base_sha256),
        {("single.0.img", "shock"): (torch.tensor([12]), torch.ones(1, 6))},
    )
    with pytest.raises(DictionaryError, match="names a feature that .*test.safetensors lacks"):
        Dictionary.open(path).with_adapters(adapter).delta("single.0.img", "shock")


def test_adapter_and_dictionary_are_not_confused(path: Path, adapter: Path) -> None:
    with pytest.raises(DictionaryError, match="it is an adapter"):
        Dictionary.open(adapter)
    with pytest.raises(DictionaryError, match="not an adapter"):
        Dictionary.open(path).with_adapters(path)
    with pytest.raises(DictionaryError, match="base_sha256"):
        save_adapter(path, make_card(), {})
    with pytest.raises(DictionaryError, match="base_sha256"):
        save_dictionary(path, make_adapter_card("1" * 64), {})


# what a caller gets wrong


def test_check_fits_names_both_shapes(path: Path) -> None:
    dictionary = Dictionary.open(path)
    dictionary.check_fits(ARCHITECTURE)
    dictionary.check_fits(replace(ARCHITECTURE, pooled_width=8))  # of which the file says nothing
    other = Architecture("sd3", (4, 0), 256, 64)
    with pytest.raises(DictionaryError) as caught:
        dictionary.check_fits(other)
    assert all(part in str(caught.value) for part in (str(path), ARCHITECTURE.describe(), other.describe()))


def test_unknown_position_and_domain(path: Path) -> None:
    dictionary = Dictionary.open(path)
    for attempt in (
        lambda: dictionary.sae("double.0.img"),
        lambda: dictionary.needed("text", ["violence"]),
        lambda: dictionary.delta("../text", "weapons"),
    ):
        with pytest.raises(DictionaryError, match="test.safetensors: it has no"):
            attempt()


def test_a_file_that_changes_is_not_read_on(path: Path) -> None:
    dictionary = Dictionary.open(path)
    path.write_bytes(path.read_bytes()[:-8])
    for attempt in (lambda: dictionary.sae("text"), lambda: dictionary.sha256):
        with pytest.raises(DictionaryError, match="changed since it was opened"):
            attempt()
    path.unlink()
    with pytest.raises(DictionaryError, match="no such file"):
        dictionary.sae("text")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", torch.full((4,), math.nan)),
        ("decoder_weight", torch.full((8, 4), math.inf)),
        ("threshold", torch.full((8,), -1.0)),
        ("scale", torch.tensor(0.0)),
        ("scale", torch.ones(1)),
        ("encoder_bias", torch.zeros(7)),
        ("encoder_weight", torch.zeros(8, 5)),
        ("encoder_bias", torch.zeros(8, dtype=torch.float64)),
        ("mean", torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_bad_tensors_are_not_saved(path: Path, name: str, value: torch.Tensor) -> None:
    before = path.read_bytes()
    sae = make_sae("text")
    sae = SAE(**{f.name: value if f.name == name else getattr(sae, f.name) for f in fields(SAE)})
    with pytest.raises(DictionaryError, match="test.safetensors: .*text/.*Nothing was written"):
        save_dictionary(path, make_card(), {"text": sae, "single.0.img": make_sae("single.0.img")})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["test.safetensors"]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("training loss", math.nan),
        ("training model", object()),
        ("positions text", PositionInfo(9)),
        ("positions text", PositionInfo(2)),  # below a feature of a domain
        ("positions text", PositionInfo(True)),
        ("domains ../x", Domain({})),
        ("domains weapons", Domain({"text": [3]})),
        ("licence data", None),
        ("licence model", "MIT"),
        ("plan 0", Action("double.0.img", "repel", "paper", 1.0)),
        ("plan 0", Action("text", "repel", "paper", 1.0, domain="shock")),
        ("title", None),
        ("title", "\x1b[31m"),
        ("title", "\ud800"),
        ("source_sha256", "abc"),
    ],
)
def test_bad_cards_are_not_saved(path: Path, where: str, value: object) -> None:
    before, card = path.read_bytes(), make_card()
    change(vars(card), where, value)
    with pytest.raises(DictionaryError, match="Nothing was written") as caught:
        save_dictionary(path, card, {p: make_sae(p) for p in FEATURES})
    assert str(path) in str(caught.value) and path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["test.safetensors"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Domain({"text": [0, 0]}),
        lambda: Gate({}, 1.0, 0.0, 1),
        *(lambda n=n: Gate({"text": TOLD}, n, 0.0, 1) for n in (math.nan, math.inf)),
        *(lambda n=n: Gate({"text": TOLD}, 1.0, n, 1) for n in (1.5, -0.1, math.nan)),
        *(lambda n=n: Gate({"text": TOLD}, 1.0, 0.0, 1, {"name": n}) for n in ((2, 1), (-1, 1))),
        lambda: Action("text", "delete", "paper", 1.0),
        lambda: Action("text", "blend", "other", 1.0),
        lambda: Action("text", "blend", "paper", math.nan),
        lambda: Action("text", "blend", "paper", 1.0, (0.2, 0.8)),
        lambda: Action("text", "blend", "paper", 1.0, (1.0, math.nan)),
    ],
)
def test_parts_check_themselves(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("rows", [[3, 1], [1, 1], [-1, 3], [1, 12], [1, 2, 3], [1.0, 2.0]])
def test_bad_rows_are_not_saved(path: Path, rows: list[float]) -> None:
    adapters = {("single.0.img", "weapons"): (torch.tensor(rows), torch.zeros(2, 6))}
    with pytest.raises(DictionaryError, match="adapter.weapons"):
        save_dictionary(path, make_card(), {p: make_sae(p) for p in FEATURES}, adapters)


def test_saving_where_nothing_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match="nowhere"):
        save_dictionary(
            tmp_path / "nowhere" / "x.safetensors", make_card(), {p: make_sae(p) for p in FEATURES}
        )


# malformed files


def test_what_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path, "this is not a file")
    refused(tmp_path / "missing.safetensors", "there is no such file")
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    refused(empty, "no .safetensors file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refused(tmp_path / "pipe", "this is not a file")


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_are_refused_unread(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"a": [1.0] * 100}, protocol=protocol))
    refused(path, "it is a pickle")
    torch.save({"a": torch.zeros(3)}, path)
    refused(path, "it is a pickle")


def test_truncated_at_every_point(path: Path) -> None:
    raw = path.read_bytes()
    for length in (*range(400), *range(400, len(raw), 37), len(raw) - 1):
        path.write_bytes(raw[:length])
        refused(path)
    path.write_bytes(raw + b"\x00")
    refused(path)
    path.write_bytes(raw)
    use(path)


HEADER_CASES = [
    ("text/encoder.weight dtype", "F64"),
    ("text/encoder.weight dtype", "I8"),
    ("text/encoder.weight dtype", "I32"),
    ("text/encoder.weight dtype", ["F32"]),
    ("text/encoder.weight dtype", {}),
    ("text/encoder.weight shape", "84"),
    ("text/scale shape", [True]),
    ("text/encoder.weight shape", [8.0, 4]),
    ("text/encoder.weight shape", [-8, -4]),
    ("text/encoder.weight shape", [4, 8]),
    ("text/encoder.weight shape", [8, 4, 1]),
    ("text/encoder.weight shape", [2**62, 4]),
    ("text/encoder.weight shape", [2**63, 2]),
    ("text/encoder.weight shape", None),
    ("text/encoder.weight data_offsets", [0]),
    ("text/encoder.weight data_offsets", None),
    ("text/encoder.weight data_offsets 0", False),
    ("text/encoder.weight data_offsets", [-128, 0]),
    ("text/encoder.weight data_offsets", [128, 0]),
    ("text/encoder.weight data_offsets", [2**40, 2**40 + 128]),
    ("text/encoder.weight data_offsets", [0, 128]),
    ("text/encoder.weight", None),
    ("text/encoder.weight", []),
    ("text/encoder.weight x", 1),
    ("text/encoder.weight shape", DROP),
    ("text/encoder.weight", Rename("../x/encoder.weight")),
    ("text/encoder.weight", Rename("/etc/passwd")),
    ("text/encoder.weight", Rename("single.7.img/encoder.weight")),
    ("text/encoder.weight", Rename("text/encoder.weight\n")),
    ("text/encoder.weight", Rename("\ud800")),
    ("text/encoder.weight", Rename("text/encoder.extra")),
    ("single.0.img/adapter.substances.rows", Rename("single.0.img/adapter.violence.rows")),
    ("single.0.img/adapter.substances.rows", Rename("single.0.img/adapter.weapons.rows")),
    ("__metadata__", DROP),
    ("__metadata__", []),
    ("__metadata__", None),
    ("__metadata__ format", "pt"),
    ("__metadata__", {"format": "pt"}),
    ("__metadata__ safedig", {}),
    ("__metadata__ safedig", "hello"),
    ("__metadata__ safedig", "[]"),
    ("__metadata__ safedig", "1"),
    ("__metadata__ safedig", "{}"),
]
CARD_CASES = [
    ("format", 1),
    ("format", 2),
    ("format", 4),
    ("format", True),
    ("format", 3.0),
    ("format", DROP),
    ("kind", "adapter"),
    ("kind", []),
    ("base_sha256", "0" * 64),
    ("extra", 1),
    ("architecture", DROP),
    ("architecture", None),
    ("architecture width", 5),
    ("architecture width", True),
    ("architecture family", "sd1"),
    ("architecture family", [[]] * 9999),
    ("architecture blocks", [1]),
    ("architecture", {"family": "sd3", "blocks": [0, 0], "width": 6, "text_width": 4}),
    ("positions", []),
    ("positions text", Rename("../text")),
    ("positions text", Rename("single.1.img")),
    ("positions text", Rename("joint.0.img")),
    ("positions text", DROP),
    ("positions double.0.img", {"prefix": 0, "quality": {}}),
    ("positions text prefix", True),
    ("positions text prefix", 3.0),
    ("positions text prefix", -1),
    ("positions text prefix", 9),
    ("positions text prefix", 10**400),
    ("positions text quality", {"fvu": "low"}),
    ("positions text quality", {"fvu": True}),
    ("domains", []),
    ("domains", {f"d{i}": {"features": {}} for i in range(MAX_DOMAINS + 1)}),
    ("domains weapons", Rename("../x")),
    ("domains weapons", Rename("Weapons")),
    ("domains weapons", Rename("")),
    ("domains weapons", Rename("w" * 65)),
    ("domains weapons", Rename("weapons\n")),
    ("domains weapons", {}),
    ("domains weapons", None),
    ("domains weapons features text", [0, 3]),
    ("domains weapons features text", [0, -1]),
    ("domains weapons features text", [False, 2]),
    ("domains weapons features text", [0.0, 2]),
    ("domains weapons features text", [2, 2]),
    ("domains weapons features text", ["0", 2]),
    ("domains weapons features text", "02"),
    ("domains weapons", {"features": {"single.3.img": [0]}}),
    ("domains weapons features text", list(range(70000))),
    ("domains weapons weights", {"text": [1.0, 1.0]}),
    ("domains weapons gate", 0),
    ("domains weapons gate", False),
    ("domains weapons gate norms", {"text": 1.0}),
    ("domains weapons gate witnesses", {}),
    ("domains weapons gate witnesses", []),
    ("domains weapons gate witnesses", DROP),
    ("domains weapons gate witnesses text", Rename("double.0.img")),
    ("domains weapons gate witnesses text", Rename("../text")),
    ("domains weapons gate witnesses text", None),
    ("domains weapons gate witnesses text features", []),
    ("domains weapons gate witnesses text features", [1, 3]),
    ("domains weapons gate witnesses text features", [1, -1]),
    ("domains weapons gate witnesses text features", [1, 1]),
    ("domains weapons gate witnesses text features", [1.0, 2]),
    ("domains weapons gate witnesses text features", [True, 2]),
    ("domains weapons gate witnesses text features", [1, 2, 0]),
    ("domains weapons gate witnesses text weights", [1]),
    ("domains weapons gate witnesses text weights", [1, "2"]),
    ("domains weapons gate witnesses text weights", [1, 10**400]),
    ("domains weapons gate witnesses text weights", DROP),
    ("domains weapons gate witnesses text offset", None),
    ("domains weapons gate witnesses text offset", -(10**400)),
    ("domains weapons gate witnesses text offset", DROP),
    ("domains weapons gate witnesses text scale", 0),
    ("domains weapons gate witnesses text scale", -1),
    ("domains weapons gate witnesses text scale", 10**400),
    ("domains weapons gate witnesses text scale", DROP),
    ("domains weapons gate witnesses text window", [0, 1]),
    ("domains weapons gate witnesses text window", [1]),
    ("domains weapons gate witnesses text window", [1.5, 0]),
    ("domains weapons gate witnesses text window", DROP),
    ("domains weapons gate forms", {"name": [3]}),
    ("domains weapons gate forms", {"name": [3, 2]}),
    ("domains weapons gate forms", {"name": [-1, 2]}),
    ("domains weapons gate forms", {"name": [0.5, 2]}),
    ("domains weapons gate forms", {"name": 0.5}),
    ("domains weapons gate false_positive_rate", 1.5),
    ("domains weapons gate false_positive_rate", -0.5),
    ("domains weapons gate prompts", -1),
    ("domains weapons gate prompts", 3.5),
    ("domains weapons gate threshold", None),
    ("domains weapons gate threshold", DROP),
    ("plan", {}),
    ("plan", [None]),
    ("plan", [asdict(Action("text", "repel", "residual", 1.0))] * (MAX_PLAN + 1)),
    ("plan 0 position", "single.5.img"),
    ("plan 0 position", []),
    ("plan 0 operator", "delete"),
    ("plan 0 operator", ["repel"]),
    ("plan 0 form", "other"),
    ("plan 0 domain", "shock"),
    ("plan 0 domain", None),
    ("plan 0 strength", 11),
    ("plan 0 strength", True),
    ("plan 0 strength", -0.1),
    ("plan 0 window", [0.2, 1]),
    ("plan 0 window", [1, 0.5, 0]),
    ("plan 0 window", [1.5, 0]),
    ("plan 0 score", {"x": []}),
    ("plan 0 strength", DROP),
    ("training", []),
    ("training", json.loads('{"x":' * 40 + "1" + "}" * 40)),
    ("training", {"x": "x" * 5000}),
    ("licence", "MIT"),
    ("licence", {"data": "MIT"}),
    ("creator", "x" * 5000),
    ("title", "a\x1b[2Jb"),
    ("title", "\ud800"),
    ("title", "\u202efdp.exe"),
    ("title", "a\n# b"),
    ("title", "a\u2028b"),
    ("title", "wea\u200bpons"),
    ("title", "\u200fb"),
    ("creator", "\u3164"),
    ("title", 1),
    ("source_sha256", "../../x"),
    ("source_sha256", 0),
]


@pytest.mark.parametrize(("where", "value"), HEADER_CASES, ids=lambda value: f"{value}"[:60])
def test_malformed_header(path: Path, where: str, value: object) -> None:
    header, data = split(path.read_bytes())
    change(header, where, value)
    path.write_bytes(join(header, data))
    refused(path)


@pytest.mark.parametrize(("where", "value"), CARD_CASES, ids=lambda value: f"{value}"[:60])
def test_malformed_card(path: Path, where: str, value: object) -> None:
    header, data = split(path.read_bytes())
    card = json.loads(header["__metadata__"]["safedig"])
    change(card, where, value)
    header["__metadata__"]["safedig"] = json.dumps(card)
    path.write_bytes(join(header, data))
    message = refused(path)
    assert len(message) < 2000 and message.isprintable()


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_file_says_how_to_make_it_again(path: Path, version: int) -> None:
    """As it was: whatever else its card says, it is not called damaged."""
    header, data = split(path.read_bytes())
    card = json.loads(header["__metadata__"]["safedig"]) | {"format": version}
    for domain in card["domains"].values():
        domain["weights"] = {position: [1.0] * len(f) for position, f in domain["features"].items()}
        if domain["gate"]:
            domain["gate"]["norms"] = dict.fromkeys(domain["gate"].pop("witnesses"), 1.0)
    header["__metadata__"]["safedig"] = json.dumps(card)
    path.write_bytes(join(header, data))
    message = refused(path)
    assert "it is of an older format" in message and "Run the `train` or `adapt` command" in message
    assert "\n" not in message and "damaged" not in message


FINITE = st.floats(-1e6, 1e6)
WINDOWS = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda w: (max(w), min(w)))


@st.composite
def witnesses(draw: st.DrawFn) -> dict[str, Witness]:
    found = {}
    for position in draw(st.lists(st.sampled_from(sorted(FEATURES)), min_size=1, unique=True)):
        features = draw(st.lists(st.integers(0, PREFIX[position] - 1), min_size=1, unique=True))
        weights = draw(st.lists(FINITE, min_size=len(features), max_size=len(features)))
        scale = draw(st.floats(1e-6, 1e6))
        found[position] = Witness(features, weights, draw(FINITE), scale, draw(WINDOWS))
    return found


@FUZZ
@given(witnesses(), FINITE, st.dictionaries(st.sampled_from("abc"), st.tuples(st.integers(0, 9), st.just(9))))
def test_any_gate_comes_back(
    path: Path, told: dict[str, Witness], threshold: float, forms: dict[str, tuple[int, int]]
) -> None:
    card = make_card()
    card.domains["weapons"].gate = gate = Gate(told, threshold, 0.5, 9, forms)
    save_dictionary(path, card, {p: make_sae(p) for p in FEATURES}, make_adapters())
    dictionary = Dictionary.open(path)
    assert dictionary.card.domains["weapons"].gate == gate
    for position in FEATURES:
        acting = make_card().domains["weapons"].features[position]
        telling = told[position].features if position in told else []
        assert dictionary.needed(position, ["weapons"])[0] == sorted({*acting, *telling})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"features": []}, "reads no feature"),
        ({"features": [1, 1]}, "names a feature twice"),
        ({"weights": [1.0]}, "lacks features or weights"),
        ({"weights": [1.0, math.nan]}, "weights of a witness must be numbers"),
        ({"offset": math.inf}, "offset of a witness must be a number"),
        *(
            ({"scale": value}, "scale of a witness must be over 0")
            for value in (0.0, -1.0, math.nan, math.inf)
        ),
        *(({"window": w}, "a window must run down") for w in ((0.2, 0.4), (math.nan, 0.0), (1.5, 0.0))),
    ],
)
def test_a_witness_that_none_can_be_is_refused(change: dict, fault: str) -> None:
    whole = Witness([1, 2], [1.0, -0.5], 0.25, 2.0, (1.0, 0.0))
    with pytest.raises(ValueError, match=fault):
        replace(whole, **change)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"title":', '"title": "x", "title":'),
        ('"text": {"prefix"', '"text": {}, "text": {"prefix"'),
        ('"seed": 0', '"seed": NaN'),
        ('"seed": 0', '"seed": -Infinity'),
        ('"seed": 0', '"seed": 1e999'),
        ('"seed": 0', '"seed": ' + "9" * 5000),
        ('"seed": 0', '"seed": ' + "[" * 100000 + "]" * 100000),
        ('"seed": 0', '"seed": ' + '{"a":' * 500 + "1" + "}" * 500),
        ('"strength": 1.5', '"strength": 1e999'),
        ('"strength": 1.5', '"strength": NaN'),
    ],
)
def test_malformed_card_text(path: Path, old: str, new: str) -> None:
    header, data = split(path.read_bytes())
    text = header["__metadata__"]["safedig"]
    assert text.count(old) == 1
    header["__metadata__"]["safedig"] = text.replace(old, new)
    path.write_bytes(join(header, data))
    refused(path)


def test_malformed_header_text(path: Path) -> None:
    raw = path.read_bytes()
    header, data = split(raw)
    text = json.dumps(header)
    for odd in (
        text.replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"', 1),
        text[:-1] + ', "text/scale": ' + json.dumps(header["text/scale"]) + "}",
        text[:-1] + ', "__metadata__": {}}',
        text + "{}",
        " " + text,
        "[" * 200000,
        '{"a":' * 200000,
        '{"a": ' + "9" * 10000 + "}",
        text.encode().replace(b"text/scale", b"text/\xff\xfe"),
        "{}",
        "[]",
        "null",
        "",
    ):
        path.write_bytes(join(odd, data))
        refused(path)
    for length in (0, 1, len(raw), 2**31, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + raw[8:])
        refused(path)


def test_oversized_card(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionary_module, "MAX_CARD", 100)
    refused(path, "its card is larger than")


def test_oversized_header(path: Path) -> None:
    header, data = split(path.read_bytes())
    path.write_bytes(join(json.dumps(header) + " " * MAX_HEADER, data))
    refused(path)


@pytest.mark.parametrize("shift", range(1, 8))
def test_misaligned_data(path: Path, shift: int) -> None:
    """Legal in the format: it is read right or refused, and doesn't crash."""
    header, data = split(path.read_bytes())
    text = json.dumps(header)
    text += " " * (-len(text) % 8 + shift)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)
    try:
        assert same(Dictionary.open(path).sae("text"), make_sae("text"))
    except DictionaryError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text/encoder.weight", math.nan),
        ("single.0.img/decoder.bias", math.inf),
        ("text/threshold", -1.0),
        ("text/scale", 0.0),
        ("text/scale", -1.0),
        ("single.0.img/adapter.substances.delta", -math.inf),
    ],
)
def test_bad_numbers(path: Path, name: str, value: float) -> None:
    header, data = split(path.read_bytes())
    start, _ = header[name]["data_offsets"]
    data = data[:start] + torch.tensor(value).numpy().tobytes() + data[start + 4 :]
    path.write_bytes(join(header, data))
    refused(path, name)
    dictionary = Dictionary.open(path)  # the header is fine: reading must refuse it too
    position = name.partition("/")[0]
    with pytest.raises(DictionaryError, match=name):
        dictionary.delta(position, "substances") if "delta" in name else dictionary.needed(
            position, ["weapons"]
        )


# anything at all


def survives(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        use(path)
    except DictionaryError as error:
        assert str(path) in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20 * len(raw) + 300_000


@FUZZ
@given(data=st.data())
def test_mutated_bytes(path: Path, data: st.DataObject) -> None:
    raw = bytearray(pristine(path))
    header = int.from_bytes(raw[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.sampled_from([8, header, len(raw)]))
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    survives(path, bytes(raw[: data.draw(st.sampled_from([len(raw), data.draw(st.integers(0, len(raw)))]))]))


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([10**400, 2**63, -1, "text", "single.0.img", "F16", "I64", [], {}, [[]], "../x"]),
)


@FUZZ
@given(data=st.data())
def test_mutated_structure(path: Path, data: st.DataObject) -> None:
    """Any value anywhere in header or card replaced by, deleted for or joined by another."""
    header, body = split(pristine(path))
    card = json.loads(header["__metadata__"]["safedig"])
    root = data.draw(st.sampled_from([header, card]))
    node = root
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and data.draw(st.booleans()):
            node = node[key]
            continue
        action = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if action == "delete":
            del node[key]
        elif action == "replace":
            node[key] = copy.deepcopy(data.draw(LEAVES))
        elif isinstance(node, dict):
            node[data.draw(st.text(max_size=8))] = copy.deepcopy(node[key])
        else:
            node.append(data.draw(LEAVES))
        break
    if root is card:
        header["__metadata__"]["safedig"] = json.dumps(card)
    survives(path, join(header, body))


PRISTINE: list[bytes] = []


def pristine(path: Path) -> bytes:
    """The valid file, which earlier examples have overwritten."""
    if not PRISTINE:
        save_dictionary(path, make_card(), {p: make_sae(p) for p in FEATURES}, make_adapters())
        PRISTINE.append(path.read_bytes())
    return PRISTINE[0]
