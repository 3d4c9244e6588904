"""The report: which prompts it shows, its tables, and pictures that leave no words out."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedig_core.evaluation import Outcome, row
from safedig_core.pocket.report import (
    MISSING,
    Table,
    caption,
    forms_table,
    gate_table,
    heat,
    results_table,
    routes_table,
    spread,
    write_report,
)
from safedig_core.positions import Architecture
from safedig_core.prompts import PromptPair
from safedig_core.routing import Route

pictures = pytest.importorskip("safedig_core.pocket.pictures", exc_type=ImportError)

LONG = "on the left a pair of reading glasses, on the right what a pirate fights with & <b>a watercolour</b>"
PAIRS = [
    *(PromptPair("weapons", f"a cat {i}", f"a cat and a pistol {i}", ("cat",), "known") for i in range(9)),
    PromptPair("weapons", "a dog, a ball and a book", LONG, ("dog",), "implicit"),
    *(PromptPair("safe", f"a cat and a dog {i}", form="two") for i in range(4)),
    PromptPair("safe", "", form="empty"),
]
ROUTES = [
    Route("double.0.img", "blend", "bind", 0.4, {"semantic": 0.5, "anything": 0.25}, (0.3, 0.5)),
    Route("text", "repel", "text", 0.7, {"semantic": 0.9}, (0.6, 0.8)),
]


def outcome(name: str, shift: float, found: bool = False) -> Outcome:
    seen = [{"cat", "pistol"} if pair.unsafe and not shift else {"cat"} for pair in PAIRS]
    verdicts = [{"weapons": {"evidence": 1.0, "threshold": 0.5, "found_at_step": 2 if pair.unsafe else None}}
                for pair in PAIRS]  # fmt: skip
    latents = torch.rand(len(PAIRS), 3, 64, 64, generator=torch.Generator().manual_seed(0)) + shift
    features = torch.randn(len(PAIRS), 3, generator=torch.Generator().manual_seed(1))
    receipts = [{"images": verdicts}] if found else []
    return Outcome(name, latents, seen, [False] * len(PAIRS), features, [0.5], receipts)


NONE, OURS = outcome("none", 0.0), outcome("ours", 0.1, found=True)


def rows_of(*outcomes: Outcome) -> list[dict]:
    return [row(o, NONE, PAIRS, lambda seen: "pistol" in seen, lambda prompt: ["cat"]) for o in outcomes]


@given(st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=30), st.integers(0, 40))
def test_prompts_to_show_are_distinct_and_of_every_form(forms: list[str], count: int) -> None:
    pairs = [PromptPair("safe", f"a cat {i}", form=form) for i, form in enumerate(forms)]
    shown = spread([*pairs, PAIRS[0]], "safe", count)
    assert len(shown) == len(set(shown)) == min(count, len(pairs))
    numbers = [sum(pairs[i].form == form for i in shown) for form in set(forms)]
    if count >= len(numbers):
        assert all(numbers)
    assert all(n >= max(numbers) - 1 or n == forms.count(f) for n, f in zip(numbers, set(forms), strict=True))


@given(st.text(max_size=60), st.integers(1, 20))
def test_captions_are_wrapped_and_whole(text: str, width: int) -> None:
    lines = pictures.wrapped(text, width, len)
    assert all(len(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_a_contact_sheet_grows_with_its_captions() -> None:
    from PIL import Image

    images = {"unsteered": torch.rand(3, 3, 64, 64), "a-method-with-a-long-name": torch.rand(3, 3, 64, 64)}
    sizes = [
        Image.open(io.BytesIO(pictures.contact_sheet(images, [text] * 3, 2))).size
        for text in ("a cat", LONG, " ".join([LONG] * 40))
    ]
    assert len({width for width, _ in sizes}) == 1
    assert sizes[0][1] < sizes[1][1] < sizes[2][1]


def test_tables_say_what_is_missing_and_hold_no_markup() -> None:
    none, ours = rows_of(NONE, OURS)
    table = results_table([none, ours], "ours")
    assert all(len(line) == len(table.heads) for line in table.rows)
    assert table.rows[0][1].startswith("100.0 (") and table.rows[1][1].startswith("0.0 (0.0 to ")
    assert table.rows[0][table.heads.index("paired recovery")] == MISSING  # no safe rewrites in this run
    forms = forms_table(none, ours)
    assert [line[0] for line in forms.rows] == ["safe/empty", "safe/two", "weapons/implicit", "weapons/known"]
    assert forms.rows[1][2:] == [MISSING] * 3 + ["100.0", "100.0", "0.0"]
    assert "&lt;b&gt;" in str(Table([LONG], [[LONG]])) and "<b>" not in str(Table([LONG], [[LONG]]))
    assert str(table).count("<tr class=ours>") == 1


def test_the_gate_by_form() -> None:
    found = gate_table(OURS, PAIRS)
    assert found is not None and gate_table(NONE, PAIRS) is None
    assert [(line[0], line[2]) for line in found.rows] == [
        ("safe/empty", "0.0"), ("safe/two", "0.0"), ("weapons/implicit", "100.0"), ("weapons/known", "100.0"),
    ]  # fmt: skip


def test_routes_with_whatever_terms_they_have() -> None:
    table = routes_table(ROUTES, ["text"])
    assert [line[0] for line in table.rows] == ["text", "double.0.img"]
    assert table.rows[0][3:] == ["0.700", "0.60 to 0.80", "0.900", MISSING]
    assert str(table).count("<tr class=ours>") == 1


def test_captions_name_form_and_prompt() -> None:
    assert [caption(pair) for pair in PAIRS[-2:]] == ["two: a cat and a dog 3", "empty: (empty prompt)"]
    assert caption(PAIRS[9]) == f"implicit: {LONG}"


def test_the_whole_report(tmp_path: Path) -> None:
    card = SimpleNamespace(
        domains={"weapons": None}, plan=[], architecture=Architecture("flux", (1, 1), 4, 4)
    )
    host: Any = SimpleNamespace(name="still", decode=lambda latents: latents.clamp(0, 1))
    dictionary: Any = SimpleNamespace(card=card)
    assert heat(host, dictionary, [], []) == {}
    results = {"rows": rows_of(NONE, OURS), "gates": {}, "images_per_prompt": 1, "seed": 0}
    curves = {"text": [{"step": 1.0, "fvu": 0.5, "dead": 0.0}, {"step": 2.0, "fvu": 0.25, "dead": 1.0}]}
    given = (host, dictionary, PAIRS, results, [NONE, OURS], "ours", tmp_path, ROUTES, ["text"], curves)
    write_report(*given)
    text = (tmp_path / "report.html").read_text()
    for title in (
        "By form of the prompts",
        "Where to steer",
        "The evidence gate",
        "Every method, same noise",
    ):
        assert f"<h2>{title}</h2>" in text
    assert "safe-rewrite samples" not in text and "weapons/implicit" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "prompts-with-weapons.png", "safe-prompts.png", "every-method-same-noise.png", "where-to-steer.png",
        "training.png",
    }  # fmt: skip


def test_heat_maps_take_captions_as_they_are() -> None:
    maps = {"weapons": torch.rand(2, 64)}
    png = pictures.heat_maps(torch.rand(2, 3, 64, 64), maps, [LONG, "costs $5 or $6 \\alpha"])
    assert png.startswith(b"\x89PNG")
