"""The shipped prompt pairs: enough of them, varied, close to their rewrites, and harmless."""

from __future__ import annotations

import os
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

import safedig_core
from safedig_core.files import DOMAIN
from safedig_core.prompt_pairs.lengths import closeness, split_words, tokens_of
from safedig_core.prompt_pairs.safe_prompts import make_prompts
from safedig_core.prompts import read_prompts

FOLDER = Path(safedig_core.__file__).parent / "prompt_pairs"
CATEGORIES = ("harassment", "hate", "illegal-activity", "self-harm", "sexual", "shocking", "violence")
FORMS = set("bare-word scene tags sentence several-objects people question quoted odd near-risk".split())
PAIRS = {name: read_prompts(FOLDER / f"{name}.jsonl") for name in (*CATEGORIES, "safe")}
SAFE = [pair.safe for pairs in PAIRS.values() for pair in pairs]
REWRITES = [pair.safe for name in CATEGORIES for pair in PAIRS[name]]
UNSAFE = [pair.unsafe for pairs in PAIRS.values() for pair in pairs if pair.unsafe is not None]


def test_there_is_a_file_for_every_category_and_one_of_safe_prompts() -> None:
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == PAIRS.keys()
    for name, pairs in PAIRS.items():
        assert DOMAIN.fullmatch(name)
        assert {pair.domain for pair in pairs} == {name}
        assert len(pairs) == 2600 if name == "safe" else len(pairs) == 64, name


def test_safe_prompts_are_what_the_grammar_makes() -> None:
    grammar = (FOLDER / "grammar.txt").read_text(encoding="utf-8")
    assert make_prompts(grammar) == PAIRS["safe"]


def test_a_form_that_runs_out_of_prompts_is_an_error() -> None:
    with pytest.raises(ValueError, match="'few' yields fewer than 3"):
        make_prompts("= x\ncat | dog\n: few 3\n{a} {x}\n")
    with pytest.raises(ValueError, match="is like another prompt"):
        make_prompts(": few 2\na grey cat\na cat, grey\n")


def test_a_slot_takes_its_article_and_never_the_same_word_twice() -> None:
    grammar = "= x\nowl | unicorn | cup of tea\n: one 1\n{a} {x}, {a} {x} and {a} {x}\n"
    made = {pair.safe for seed in range(20) for pair in make_prompts(grammar, seed)}
    assert len(made) > 1
    for prompt in made:
        assert sorted(re.split(", | and ", prompt)) == ["a cup of tea", "a unicorn", "an owl"]


def test_forms_are_mixed() -> None:
    forms = Counter(pair.form for pair in PAIRS["safe"])
    assert set(forms) == FORMS
    assert forms["near-risk"] >= 500 and min(forms.values()) >= 90
    for start in range(0, len(PAIRS["safe"]), 650):
        part = Counter(pair.form for pair in PAIRS["safe"][start : start + 650])
        assert set(part) == FORMS and part["near-risk"] >= 100


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_rewrite_changes_few_words_and_keeps_the_length(category: str) -> None:
    close = closeness(PAIRS[category])
    assert close.equal >= 0.9 and close.median_difference == 0 and close.common > 0.78, close
    each = [(closeness([pair]), pair) for pair in PAIRS[category]]
    for one, pair in each:
        assert one.median_difference <= 1 and 0.3 <= one.common < 1, pair


def test_sides_are_as_long_in_the_tokens_of_t5() -> None:
    comfy = os.environ.get("COMFYUI_PATH")
    if not comfy:
        pytest.skip("COMFYUI_PATH does not name a ComfyUI folder, which has T5's tokenizer")
    split = tokens_of(str(Path(comfy, "comfy", "text_encoders", "t5_tokenizer", "tokenizer.json")))
    close = closeness([pair for name in CATEGORIES for pair in PAIRS[name]], split)
    assert close.equal > 0.975 and close.median_difference == 0 and close.common > 0.81, close


@pytest.mark.parametrize("prompts", [UNSAFE, REWRITES], ids=["unsafe", "rewrites"])
def test_no_two_sides_are_near_duplicates(prompts: list[str]) -> None:
    """Token Jaccard over all files; that of two prompts from one template would be 0.6 and more."""
    for (a, left), (b, right) in combinations(((p, set(split_words(p))) for p in prompts), 2):
        assert len(left & right) < 0.5 * len(left | right), (a, b)


def test_no_prompt_is_on_both_sides() -> None:
    assert not {" ".join(split_words(p)) for p in SAFE} & {" ".join(split_words(p)) for p in UNSAFE}


def test_no_prompt_is_there_twice() -> None:
    texts = [" ".join(split_words(prompt) or [prompt]) for prompt in SAFE + UNSAFE]
    assert [text for text, count in Counter(texts).items() if count > 1] == []


@pytest.mark.parametrize("name", PAIRS)
def test_styles_and_lengths_vary(name: str) -> None:
    styles = r"photo|film|cinematic|painting|watercolour|illustration|sketch|drawing|comic|anime|render|pixel"
    prompts = [pair.unsafe or pair.safe for pair in PAIRS[name]]
    found = [style for prompt in prompts for style in re.findall(styles, prompt.lower())]
    assert len(set(found)) >= 6
    assert len(found) < 0.7 * len(prompts)  # many prompts name no style
    lengths = [len(split_words(prompt)) for prompt in prompts]
    assert min(lengths) <= 9
    assert 18 <= max(lengths) <= 50  # all fit in CLIP's 77 tokens


def test_safe_prompts_come_close_to_risky_ones() -> None:
    for subject in ("knife", "statue", "swimsuit", "red paint", "water pistol", "syringe", "bath ", "rope"):
        assert any(subject in pair.safe for pair in PAIRS["safe"]), subject


def test_nobody_is_a_minor_and_no_rewrite_is_undressed() -> None:
    young = "child|kid|boy|girl|baby|babies|teen|teenager|toddler|infant|minor|pupil|student|school"
    for prompt in SAFE + UNSAFE:
        assert not re.search(rf"\b({young})(s|ren)?\b", prompt.lower()), prompt
    for prompt in SAFE:
        assert not re.search(r"\b(nude|naked|topless|undressed|unclothed|lingerie)\b", prompt.lower()), prompt


def test_no_safe_side_names_what_the_categories_are_about() -> None:
    """A blunt list: of words that stand for nothing harmless."""
    risky = (
        r"corpse|gore|gory|severed|decapitat\w*|mutilat\w*|behead\w*|rotting|maggots?|bleeding|bloody"
        r"|bloodstained|suicid\w*|noose|hanged|overdos\w*|strangl\w*|stabs?|stabbing|murder\w*|kill\w*"
        r"|rape\w*|assault\w*|tortur\w*|massac\w*|execut\w*|bomb\w*|grenade|gunman|terror\w*|rifle"
        r"|cocaine|heroin|meth|marijuana|cannabis|hashish|opium|ecstasy|drugs?|smuggl\w*|steal\w*|stolen"
        r"|robb(er|ers|ing)|thie(f|ves)|burglar\w*|arson\w*|poach(er|ers|ing)|counterfeit|bribe|racis\w*"
        r"|nazi\w*|swastika|suprem\w*|hate|hateful|genocid\w*|stalk(er|ing)|grop(ed|ing)|threat\w*|bullied"
        r"|harass\w*|drown\w*|wounds?|porn\w*|erotic|sexy|self-harm|weapons?"
    )
    for prompt in SAFE:
        assert not re.search(rf"\b({risky})\b", prompt.lower()), prompt
