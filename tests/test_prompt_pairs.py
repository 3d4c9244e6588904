"""The shipped prompt pairs: enough of them, varied, close to their rewrites, and harmless."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

import safedig_core
from safedig_core.files import DOMAIN
from safedig_core.prompts import PromptPair, read_prompts

FOLDER = Path(safedig_core.__file__).parent / "prompt_pairs"
CATEGORIES = ("harassment", "hate", "illegal-activity", "self-harm", "sexual", "shocking", "violence")
PAIRS = {name: read_prompts(FOLDER / f"{name}.jsonl") for name in (*CATEGORIES, "safe")}
SAFE = [pair.safe for pairs in PAIRS.values() for pair in pairs]
UNSAFE = [pair.unsafe for pairs in PAIRS.values() for pair in pairs if pair.unsafe is not None]


def words(prompt: str) -> list[str]:
    return re.findall(r"[\w'-]+", prompt.lower())


def shared(pair: PromptPair) -> float:
    """The share of the longer prompt's words that both have."""
    unsafe, safe = Counter(words(pair.unsafe or "")), Counter(words(pair.safe))
    return (unsafe & safe).total() / max(unsafe.total(), safe.total())


def test_there_is_a_file_for_every_category_and_one_of_safe_prompts() -> None:
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == PAIRS.keys()
    for name, pairs in PAIRS.items():
        assert DOMAIN.fullmatch(name)
        assert {pair.domain for pair in pairs} == {name}
        assert len(pairs) == 200 if name == "safe" else len(pairs) >= 60, name


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_rewrite_keeps_most_of_its_prompt(category: str) -> None:
    shares = [shared(pair) for pair in PAIRS[category]]
    low = PAIRS[category][shares.index(min(shares))]
    assert 0.5 <= min(shares) <= max(shares) < 1, low
    assert sum(shares) / len(shares) > 0.7


@pytest.mark.parametrize("prompts", [UNSAFE, SAFE], ids=["unsafe", "safe"])
def test_no_two_prompts_are_near_duplicates(prompts: list[str]) -> None:
    """Token Jaccard over all files; that of two prompts from one template would be 0.6 and more."""
    for (a, left), (b, right) in combinations(((p, set(words(p))) for p in prompts), 2):
        assert len(left & right) < 0.5 * len(left | right), (a, b)


def test_no_prompt_is_on_both_sides() -> None:
    assert not {" ".join(words(p)) for p in SAFE} & {" ".join(words(p)) for p in UNSAFE}


@pytest.mark.parametrize("name", PAIRS)
def test_styles_and_lengths_vary(name: str) -> None:
    styles = r"photo|film|cinematic|painting|watercolour|illustration|sketch|drawing|comic|anime|render|pixel"
    prompts = [pair.unsafe or pair.safe for pair in PAIRS[name]]
    found = [style for prompt in prompts for style in re.findall(styles, prompt.lower())]
    assert len(set(found)) >= 6
    assert len(found) < 0.7 * len(prompts)  # many prompts name no style
    lengths = [len(words(prompt)) for prompt in prompts]
    assert min(lengths) <= 9
    assert 18 <= max(lengths) <= 50  # all fit in CLIP's 77 tokens


def test_safe_prompts_come_close_to_risky_ones() -> None:
    for subject in ("knife", "statue", "swimsuit", "red paint", "water pistol", "syringe", "bath ", "rope"):
        assert any(subject in pair.safe for pair in PAIRS["safe"]), subject
    half = len(PAIRS["safe"]) // 2
    for part in (PAIRS["safe"][:half], PAIRS["safe"][half:]):  # a capture takes one, calibration the other
        near = r"knife|statue|swim|red |pistol|syringe|rope|sword|skull|blood|beach|boxe|police|soldier|fire"
        assert sum(bool(re.search(near, pair.safe)) for pair in part) >= 10


def test_nobody_is_a_minor_and_no_rewrite_is_undressed() -> None:
    young = "child|kid|boy|girl|baby|babies|teen|teenager|toddler|infant|minor|pupil|student|school"
    for prompt in SAFE + UNSAFE:
        assert not re.search(rf"\b({young})(s|ren)?\b", prompt.lower()), prompt
    for prompt in SAFE:
        assert not re.search(r"\b(nude|naked|topless|undressed|unclothed|lingerie)\b", prompt.lower()), prompt
