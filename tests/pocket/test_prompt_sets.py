"""The shipped prompt sets: that nothing evaluated is in another set, and what is held out really is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest

from safedig_core.pocket.prompt_sets import EVALUATE, FOLDER, NAMES, PAIRS, SAFE_FORMS, build_sets, vocabulary
from safedig_core.pocket.world import (
    DOMAIN,
    HELD_OUT_PHRASINGS,
    KINDS,
    PHRASINGS,
    RISKY,
    SAFE,
    WORLD,
    concept_named,
    concepts_in,
    phrased,
    with_article,
)
from safedig_core.prompt_pairs import safe_prompts
from safedig_core.prompts import PromptPair, read_prompts

SETS = {path.stem: read_prompts(path) for path in sorted(FOLDER.glob("*.jsonl"))}
PAIRED = ("train", "tune", "evaluate")
READ = ("usual", "vocabulary")  # by a text encoder only
POCKET = ("known", "phrasing", "single", "bare", "three", "near-risk")  # safe forms made of its concepts
PAIRS_OF = [
    (name, pair) for name in PAIRED for pair in SETS[name] if pair.unsafe and pair.form != "vocabulary"
]


def texts(pairs: Iterable[PromptPair]) -> list[str]:
    return [text for pair in pairs for text in pair.texts if text]


def words(pairs: Iterable[PromptPair]) -> set[str]:
    return set(re.findall("[a-z]+", " ".join(texts(pairs)).lower()))


def names(kind: str, concepts: Iterable[str] = WORLD) -> set[str]:
    return {name for concept in concepts for name in getattr(WORLD[concept], kind)}


def names_in(prompt: str) -> set[str]:
    """The names that a prompt uses, the longest where one is part of another."""
    every = sorted((name for kind in KINDS for name in names(kind)), key=len, reverse=True)
    return {
        found.lower() for found in re.findall(rf"\b(?:{'|'.join(map(re.escape, every))})\b", prompt, re.I)
    }


def said(prompt: str) -> set[str]:
    """The phrasings that a prompt of the pocket world may be made with, but the shortest."""
    every = {p: re.escape(p).replace(r"\{\}", ".+").replace(r"\{0\}", ".+").replace(r"\{1\}", ".+")
             for p in (*PHRASINGS, *HELD_OUT_PHRASINGS) if p != "{}"}  # fmt: skip
    return {p for p, pattern in every.items() if re.fullmatch(pattern, prompt)}


def scenes(name: str) -> set[frozenset[str]]:
    asked = [text for pair in SETS[name] if pair.unsafe or pair.form in POCKET for text in pair.texts]
    found = [frozenset(concepts_in(re.sub(" for a children's book$", "", text))) for text in asked]
    return {scene for scene in found if len(scene) > 1}


def test_files_are_what_the_script_makes():
    assert build_sets() == SETS
    assert SETS.keys() == {*PAIRED, *READ}


def test_the_world_is_varied():
    assert len(WORLD) >= 85 and len(SAFE) >= 60 and sum(map(len, RISKY.values())) >= 25
    assert len(set(PHRASINGS)) >= 30 and not set(PHRASINGS) & set(HELD_OUT_PHRASINGS)


def test_sizes():
    for name, counts in PAIRS.items():
        assert Counter(pair.domain for of, pair in PAIRS_OF if of == name) == counts
    for name, forms in SAFE_FORMS.items():
        extra = {"varied": 1910} if name == "usual" else {"empty": 1}
        found = Counter(pair.form for pair in SETS[name] if not pair.unsafe)
        if name == "tune":
            assert found["near-things"] >= 30 and found["things"] >= 60
            found["things"] += found.pop("near-things")
        assert found == forms | extra
    assert len(SETS["usual"]) >= 5000 and max(map(len, texts(SETS["usual"]))) <= 200
    assert {pair.domain for pair in SETS["usual"]} == {"safe"}
    near = Counter(WORLD[c].near for pair in SETS["tune"] if pair.form == "near-risk"
                   for c in concepts_in(pair.safe))  # fmt: skip
    assert all(near[domain] >= 12 for domain in RISKY)


def test_no_two_sets_share_a_prompt_and_no_two_pairs_a_scene():
    for one, other in combinations(SETS, 2):
        assert not set(texts(SETS[one])) & set(texts(SETS[other]))
        assert not scenes(one) & scenes(other) or not {one, other}.isdisjoint(READ)
    assert not scenes("usual") & scenes("evaluate")
    assert all(len(texts(pairs)) == len(set(texts(pairs))) for pairs in SETS.values())


@pytest.mark.parametrize("name", ["train", "tune"])
def test_what_is_held_out_is_in_no_training(name: str):
    used = set().union(*map(names_in, texts(SETS[name])))
    held = [concept for concept in WORLD if WORLD[concept].held]
    for kind in ("aliases", "unseen", "implicit"):
        assert not used & names(kind)
    assert not used & names("names", held)
    for concept in {c for some in RISKY.values() for c in some} - {*held}:
        every = WORLD[concept].names
        assert used & {*every} == {*every[NAMES[name]]}, "tune has the names that train has not"
    assert not set(HELD_OUT_PHRASINGS) & set().union(*map(said, texts(SETS[name])))


def test_the_vocabulary_names_nothing_that_is_held_out():
    """It may name what dictionaries were made with, as a part of other words ("molotov cocktail")."""
    used = set().union(*map(names_in, texts(SETS["vocabulary"])))
    known = names("names", (c for c in WORLD if not WORLD[c].held))
    assert {name for name in used if DOMAIN[concept_named(name) or ""] != "safe"} <= known
    assert not used & names("unseen")
    assert not set(HELD_OUT_PHRASINGS) & set().union(*map(said, texts(SETS["vocabulary"])))


def test_each_word_of_the_vocabulary_is_captured_once_with_its_rewrite():
    text = (FOLDER.parent / "vocabulary.txt").read_text(encoding="utf-8")
    groups = re.findall(r"^\[(\w+): (\w+)\]\n(.+)$", text, re.MULTILINE)
    assert {domain for domain, *_ in groups} == {*RISKY} and {rewrite for _, rewrite, _ in groups} <= {*SAFE}
    asked = [(d, with_article(w), rewrite) for d, rewrite, some in groups for w in some.split("|")]
    captured = [pair for pair in SETS["train"] if pair.form == "vocabulary"]
    assert len(captured) == len(asked) == len(set(asked))
    for domain, word, rewrite in asked:
        assert any(
            pair.unsafe.replace(word, with_article(instead)) == pair.safe
            for instead in WORLD[rewrite].names
            for pair in captured
            if pair.domain == domain and pair.unsafe
        )


def test_usual_lines_have_no_risk_and_no_unseen_name():
    used = set().union(*map(names_in, texts(SETS["usual"])))
    assert not used & names("unseen")
    assert {DOMAIN[concept_named(name) or ""] for name in used} == {"safe"}
    assert used >= names("names", SAFE) | names("aliases", SAFE) | names("implicit", SAFE)


def test_the_sceptics_prompts_are_in_no_set():
    pairs = read_prompts(Path(__file__).parent / "sceptic.jsonl")
    assert Counter(pair.form for pair in pairs if pair.unsafe) == dict.fromkeys(
        ("capitals", "typing-error", "long-prompt", "story", "plural", "german"), 32
    )
    assert not set(texts(pairs)) & {text for name in SETS for text in texts(SETS[name])}


def test_every_safe_prompt_is_free_of_risk():
    """But for names that have a risky word in them ("root beer")."""
    pairs = [pair for some in SETS.values() for pair in some if pair.form != "figurative"]
    assert all(DOMAIN[c] == "safe" for pair in pairs for c in concepts_in(pair.safe))


def test_the_sceptics_figures_of_speech_are_new():
    learned = [words for kind, _, words in vocabulary() if kind == "figurative"]
    assert len(learned) == 1 and len(learned[0]) >= 250
    sceptic = read_prompts(Path(__file__).parent / "sceptic.jsonl")
    idioms = [pair.safe.lower() for pair in sceptic if pair.form == "idiom"]
    assert idioms and not any(phrase.lower() in idiom for idiom in idioms for phrase in learned[0])


def test_all_phrasings_are_used():
    assert set().union(*map(said, texts(SETS["train"]))) == set(PHRASINGS) - {"{}"}
    assert set().union(*map(said, texts(SETS["evaluate"]))) >= set(HELD_OUT_PHRASINGS)


def test_words_and_sentences_of_evaluate_are_its_own():
    lists, _ = safe_prompts.read_grammar((FOLDER.parent / "sentences.txt").read_text(encoding="utf-8"))
    own = set(re.findall("[a-z]{3,}", " ".join(lists["evaluate-unknown"] + lists["evaluate-gibberish"])))
    assert len(lists["unknown"]) >= 1000 and len(lists["evaluate-unknown"]) >= 30
    calibrated = set(lists["tune-unknown"])
    assert len(calibrated) >= 150
    assert calibrated.isdisjoint(lists["unknown"] + lists["evaluate-unknown"])
    assert not own & words(pair for name in SETS if name != "evaluate" for pair in SETS[name])
    assert not own & set(re.findall("[a-z]+", " ".join(name for kind in KINDS for name in names(kind))))
    assert {pair.safe for pair in SETS["evaluate"] if pair.form == "sentence"} == set(
        lists["evaluate-sentence"]
    )


@pytest.mark.parametrize(("name", "pair"), PAIRS_OF)
def test_the_sides_of_a_pair_differ_in_the_risky_thing_only(name: str, pair: PromptPair):
    assert pair.unsafe is not None
    _, kind, held, phrasings = EVALUATE[pair.form]
    (risky,) = {c for c in concepts_in(pair.unsafe) if DOMAIN[c] != "safe"}
    concept = WORLD[risky]
    assert concept.domain == pair.domain and concept.held == held
    ways = {
        pair.unsafe.replace(with_article(name), with_article(instead), 1)
        for name in getattr(concept, kind)
        for instead in WORLD[concept.rewrite].names
    }
    assert pair.safe in ways
    kept = [c for c in concepts_in(pair.unsafe.removesuffix(" for a children's book")) if c != risky]
    assert sorted(pair.keep) == sorted(kept) and concept.rewrite not in pair.keep and len(kept) <= 2
    assert name == "evaluate" or not any(WORLD[c].near for c in kept)
    assert said(pair.unsafe) & set(phrasings) or pair.unsafe in (
        phrased("{}", order) for order in ordered_names(pair.unsafe)
    )


def ordered_names(prompt: str) -> list[list[str]]:
    """The prompt's names from left to right."""
    return [sorted(names_in(prompt), key=prompt.index)]


def test_the_risky_thing_stands_anywhere():
    for name in PAIRED:
        places = Counter()
        for pair in (pair for of, pair in PAIRS_OF if of == name):
            asked = [DOMAIN[c] != "safe" for c in concepts_in(pair.unsafe or "")]
            if len(asked) > 1:
                places[asked.index(True) == 0] += 1
        assert 0.35 < places[True] / places.total() < 0.65
    singles = Counter(name for name, pair in PAIRS_OF if not pair.keep)
    assert all(3 <= singles[name] <= 40 for name in PAIRED)


def test_every_third_line_of_evaluate_is_of_all_forms():
    every = Counter((pair.domain, pair.form) for pair in SETS["evaluate"])
    third = Counter((pair.domain, pair.form) for pair in SETS["evaluate"][::3])
    assert every.keys() == {(d, f) for d in RISKY for f in EVALUATE} | {
        ("safe", form) for form in (*SAFE_FORMS["evaluate"], "empty")
    }
    assert all(every[form] // 3 <= third[form] <= every[form] // 3 + 1 for form in every)
    near = {
        WORLD[c].near for p in SETS["evaluate"][::3] if p.form == "near-risk" for c in concepts_in(p.safe)
    }
    assert near >= set(RISKY)


def test_risky_forms_have_their_sizes():
    counts = Counter((pair.domain, pair.form) for pair in SETS["evaluate"] if pair.unsafe)
    assert counts == {(domain, form): asked[0] for domain in RISKY for form, asked in EVALUATE.items()}


# A reader of the report sees here what the sets before evaluation never said.
WORDS_OF_EVALUATE_ONLY = """
abandoned accompanied address advertisement agaric airliner ale alongside already anamorphic archer arrow
asked baby bags bananas barley baroque bassinet bathysphere batter bayonet better billboards blasting
bleeding blintwhistle bloodstain blows blueprint boomerang both bourbon bow brackish brains brewery
broadswords bubbly buried canal candlestick carrots carving catalogue caught cava ceiling change cherubs
chopping cigarette claret clearing cleaver close colada colds cork corrected corridor council coupling
cowboy cranium creature cummerbund cursive curtains cyberpunk daiquiri daughters dealer depicts device devil
dirk do dominoes dots dovecote doze drips drizzle duel eats eauio eels epaulette escapement espresso exhibit
expired explosives express fangs featuring fed fermented fights fireball flare fly foaming fold gently ghent
ghoul ghtyb girandole goes gold grain grape gravestone grenade gribnack hallucinate happens headstone
hedgehogs hens hhh hibernate hides highlands holographic hoplenot hotel humpback hygrometer hypodermic
indian injection invoice jubbin knights labelled lacing lager landmine last leather linger litres lolly
longbow loosen losing magenta mai main marimba merely merlot migration miller minds miners miriam missed
mixed mmmnnn narcotic needle nightmares nineteen noir northern nothing number oktoberfest oni orrery ouoiea
overnight painkiller patience pebbles pina pinot pirate placed played pointed poisons polarised poleaxe
pollsters poniard popped pops posted postpone poured pours prime prosecco psychedelic puddles qpwoei quarter
rapiers rehearsal restless revolver rivers rock rocks saboteur sabres salmon sarcophagus scotch sdlkj second
seventeen shaken shatters shed shooter shroom sidearm skyline slasher sledgehammer sleeve smoke sommelier
sopranos sousaphone spa spider spirit spy stabs stamp sticks stirred stout stubborn submarine suits
swallowed swings syringe tabby tablet tai teaspoon terrapin textbook theodolite theremin these thesis
thoughts thread thursday tide tomahawk tombstone track translation trivet turbines turn upon valve
velocipede vermouth vikings voters vungle west whites whitewash wjkp xqzv year yesterday your zoetrope
""".split()


def test_the_words_of_evaluate_only():
    others = words(pair for name, pairs in SETS.items() if name != "evaluate" for pair in pairs)
    assert sorted(words(SETS["evaluate"]) - others) == WORDS_OF_EVALUATE_ONLY
