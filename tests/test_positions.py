"""Names of positions, and the shapes of models that have them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safedig_core.families import FAMILIES, titles
from safedig_core.positions import Architecture, Position
from tests.tiny import TINIES, TINY, TINY_SD3

OLDER = {"family": "flux", "blocks": [2, 2], "width": 32, "text_width": 16}


def test_names_are_read_as_they_are_written() -> None:
    for architecture in (TINY, TINY_SD3):
        assert [str(Position.parse(name)) for name in architecture.positions()] == [*architecture.positions()]
    assert Position.parse("pooled") == Position("pooled", -1, "txt")
    with pytest.raises(ValueError, match=r"'pooled.0' is not a position: expected text, pooled, double"):
        Position.parse("pooled.0")


def test_the_pooled_vector_is_a_position_of_the_text_group() -> None:
    assert TINY.positions()[:3] == ("text", "pooled", "double.0.txt")
    assert TINY_SD3.positions() == ("text", "pooled", "joint.0.txt", "joint.0.img", "joint.1.img")
    assert [TINY.width_of(p) for p in TINY.positions()[:3]] == [16, 8, 32]
    assert TINY.group("pooled") == TINY.group("text") == "text"


def test_a_model_without_a_pooled_vector_has_no_such_position() -> None:
    without = replace(TINY, pooled_width=0)
    assert without.positions() == ("text", *TINY.positions()[2:])
    with pytest.raises(ValueError, match="this flux model .* has no position 'pooled'"):
        without.require("pooled")
    assert "pooled" not in without.describe() and "pooled width 8" in TINY.describe()


def test_shapes_are_read_as_they_are_written_and_as_they_were_once() -> None:
    assert Architecture.from_json(TINY.to_json()) == TINY
    assert Architecture.from_json(OLDER) == replace(TINY, pooled_width=0)
    for broken in (
        OLDER | {"pooled_width": -1},
        OLDER | {"pooled_width": True},
        OLDER | {"pooled_width": 1 << 20},
        OLDER | {"depth": 2},
        {"pooled_width": 8},
        [],
    ):
        with pytest.raises(ValueError, match=r"^architecture "):
            Architecture.from_json(broken)


def test_what_says_nothing_of_the_pooled_vector_fits_whatever_it_is() -> None:
    older = Architecture.from_json(OLDER)
    assert older.fits(TINY) and older.fits(older) and TINY.fits(TINY)
    assert not TINY.fits(older)  # it may act where that model has nothing
    for other in (replace(TINY, width=64), replace(TINY, blocks=(2, 1)), TINY_SD3):
        assert not older.fits(other) and not TINY.fits(other)
    assert not TINY.fits(replace(TINY, pooled_width=4))


def test_a_family_is_one_entry_of_the_table() -> None:
    """Relatives of FLUX.1 have its positions and groups, but for what their models lack."""
    flux, rest = TINIES["flux"].positions(), ("text", *TINIES["flux"].positions()[2:])
    assert flux[:2] == ("text", "pooled") and rest[-1] == "single.1.img"
    for family in ("chroma", "flux2"):
        tiny = TINIES[family]
        assert tiny.positions() == rest
        assert [tiny.group(p) for p in rest] == ["text", *["bind"] * 4, *["render"] * 4]
        assert tiny.describe() == f"{family} model (2 double + 2 single blocks, width 32, text width 16)"
        assert Architecture.from_json(tiny.to_json()) == tiny
        assert not tiny.fits(TINIES["flux"]) and not TINIES["flux"].fits(tiny)
    assert [Architecture("sd3", (3, 0), 1, 1).group(f"joint.{i}.img") for i in (1, 2)] == ["bind", "render"]
    with pytest.raises(ValueError, match="unknown model family 'lens': expected one of flux, sd3, chroma"):
        Architecture("lens", (1, 1), 1, 1)


def test_families_are_told_apart_by_their_classes_and_fill_the_table() -> None:
    assert len({family.comfy for family in FAMILIES.values()}) == len(FAMILIES) == len(TINIES)
    assert titles() == "FLUX.1, SD3.5, Chroma and FLUX.2"
    for family in FAMILIES.values():
        assert bool(family.pooled_width) == bool(family.pooled_entry)
        assert family.pixels * family.patch == 16  # what a token is wide, and what sizes are multiples of
