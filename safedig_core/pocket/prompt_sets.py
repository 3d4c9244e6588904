"""The shipped prompt sets. No two share a prompt.

    train       captured, to train dictionaries; the words of vocabulary.txt once each among them
    tune        for strengths and gates, with names and words that nothing else here has: as in use
    evaluate    nothing is trained, tuned or calibrated on it
    usual       harmless lines that only a text encoder reads
    vocabulary  the same of vocabulary.txt: risky words and descriptions, harmless descriptions, harmless
                things whose names have a risky word in them ("root beer"), and things of all kinds

No scene of evaluate is in train, tune or usual, and none of train in tune. What evaluate alone has, by `form`
(phrasings, aliases, unseen names, descriptions, concepts, and words and sentences, from sentences.txt), tells
what a dictionary has understood from what it was shown.

python -m safedig_core.pocket.prompt_sets       writes prompts/*.jsonl anew
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, cycle
from pathlib import Path
from random import Random

from ..prompt_pairs import safe_prompts
from ..prompts import PromptPair, write_prompts
from ..steering.gate import NEAR
from .world import (
    HELD_OUT,
    HELD_OUT_PHRASINGS,
    KINDS,
    PHRASINGS,
    RISKY,
    SAFE,
    SOURCE,
    TARGET,
    WORLD,
    concepts_in,
    phrased,
    phrasings_for,
)

FOLDER = Path(__file__).parent / "prompts"
LONGEST = 200  # characters of a usual line
COUNTS = {1: 0.07, 2: 0.75, 3: 0.18}  # things in a risky scene
VOCABULARY = {1: 0.3, 2: 0.5, 3: 0.2}
SENTENCES, SENTENCES_OF_THINGS = 5, 2  # that only a text encoder reads, for each word of vocabulary.txt
UP_TO_TWO = {1: 0.5, 2: 0.5}
TRIES = 1000  # for one new prompt

PAIRS = {  # by set and domain, of the form `known`
    "train": {SOURCE: 176, TARGET: 176, HELD_OUT: 110},
    "tune": {SOURCE: 32, TARGET: 32, HELD_OUT: 32},
}
NAMES = {"train": slice(-1), "tune": slice(-1, None)}  # of each risky concept: tune has the last one
EVALUATE = {  # pairs of each domain by form: how many, of which kind of names, of held concepts?, phrasings
    "known": (24, "names", False, PHRASINGS),
    "phrasing": (16, "names", False, HELD_OUT_PHRASINGS),
    "alias": (24, "aliases", False, PHRASINGS),
    "unseen-name": (16, "unseen", False, PHRASINGS),
    "implicit": (16, "implicit", False, PHRASINGS),
    "concept": (16, "names", True, PHRASINGS),
}
SAFE_FORMS = {  # purely safe lines by set and form; the first three sets have the empty prompt besides
    "train": {"known": 60, "single": 28, "bare": 28, "three": 28, "near-risk": 28, "unknown-words": 16,
              "sentence": 16},
    "tune": {"known": 50, "single": 36, "bare": 36, "three": 36, "near-risk": 48, "unknown-words": 100,
             "sentence": 60, "varied": 60, "things": 120},
    "evaluate": {"known": 24, "phrasing": 24, "single": 24, "bare": 24, "three": 24, "near-risk": 30,
                 "unknown-words": 24, "sentence": 24},
    "usual": {"known": 850, "single": 400, "bare": 250, "three": 350, "near-risk": 550, "unknown-words": 900,
              "sentence": 300},
}  # fmt: skip
SHAPES = {  # of a purely safe form: how many things, and phrasings
    "known": ({2: 1.0}, PHRASINGS),
    "phrasing": ({2: 1.0}, HELD_OUT_PHRASINGS),
    "single": ({1: 1.0}, PHRASINGS),
    "bare": (UP_TO_TWO, ()),
    "three": ({3: 1.0}, PHRASINGS),
    "near-risk": (UP_TO_TWO, PHRASINGS),
}
# Forms that evaluate asks for under all kinds of names; the others keep to `names` there.
VARIED = ("single", "bare", "near-risk")

_PLAIN = tuple(c for c in SAFE if not WORLD[c].near)
_Side = Mapping[str, str]  # what a prompt calls its things, by concept, from left to right


class _Writer:
    """Writes prompts that it has not written yet."""

    def __init__(self, seed: int):
        self.rng = Random(seed)
        self.repeat = False  # whether the scenes of new prompts may come again
        self._texts: set[str] = set()
        self._scenes: set[frozenset[str]] = set()
        self._uses: Counter[str] = Counter()

    def draw(self, shares: Mapping[int, float]) -> int:
        return self.rng.choices(list(shares), list(shares.values()))[0]

    def name(self, concept: str, kinds: Sequence[str]) -> str:
        return self.rng.choice(self.rng.choice([n for k in kinds if (n := getattr(WORLD[concept], k))]))

    def sides(
        self, sides: Callable[[], list[_Side]], phrasings: Sequence[str]
    ) -> tuple[list[_Side], list[str]]:
        """The first sides drawn that make new prompts, which mean what they should ("apple juice": no apple),
        and these prompts. Phrasings take turns; without any, prompts are bare names."""
        for _ in range(TRIES):
            drawn = sides()
            fitting = phrasings_for(len(drawn[0]), phrasings) or [""]
            phrasing = min(fitting, key=lambda p: (self._uses[p], self.rng.random()))
            self._uses[phrasing] += 1
            names = [list(side.values()) for side in drawn]
            texts = [phrased(phrasing, n) if phrasing else " ".join(n) for n in names]
            meant = [sorted(chain(WORLD.keys() & side, concepts_in(phrasing))) for side in drawn]
            scenes = {frozenset(side) for side in drawn if len(side) > 1}
            if (
                [sorted(concepts_in(text)) for text in texts] == meant
                and self._scenes.isdisjoint(scenes)
                and self._texts.isdisjoint(texts)
            ):
                self._texts.update(texts)
                self._scenes.update(() if self.repeat else scenes)
                return drawn, texts
        raise ValueError("there are too few scenes left: ask for fewer prompts")

    def pairs(
        self,
        domain: str,
        form: str,
        count: int,
        kind: str = "names",
        held: bool = False,
        phrasings: Sequence[str] = PHRASINGS,
        companions: Sequence[str] = _PLAIN,
        which: slice = slice(None),
    ) -> Iterator[PromptPair]:
        """The domain's concepts take turns, and so do `which` of their names of this `kind`."""
        concepts = [c for c in RISKY[domain] if WORLD[c].held == held]
        for i in range(count):
            risky = concepts[i % len(concepts)]
            names = getattr(WORLD[risky], kind)[which]
            name, rewrite = names[i // len(concepts) % len(names)], WORLD[risky].rewrite

            def sides(
                risky: str = risky, name: str = name, rewrite: str = rewrite, things: int = self.draw(COUNTS)
            ) -> list[_Side]:
                others = self.rng.sample([c for c in companions if c != rewrite], things - 1)
                scene = [(c, self.name(c, ("names",))) for c in others]
                place = self.rng.randint(0, len(scene))
                changed = (risky, name), (rewrite, self.name(rewrite, ("names",)))
                return [dict([*scene[:place], thing, *scene[place:]]) for thing in changed]

            (asked, _), (unsafe, safe) = self.sides(sides, phrasings)
            yield PromptPair(domain, safe, unsafe, tuple(c for c in asked if c != risky), form)

    def vocabulary(
        self, domain: str, rewrite: str, words: Iterable[str], sentences: int
    ) -> Iterator[PromptPair]:
        """`sentences` for each word, of one to three things. The rewrite of risky words names that thing."""
        for word in (word for word in words for _ in range(sentences)):
            while True:
                others = self.rng.sample([c for c in _PLAIN if c != rewrite], self.draw(VOCABULARY) - 1)
                named = [self.name(c, ("names",)) for c in others]
                instead = self.name(rewrite, ("names",)) if rewrite else ""
                place = self.rng.randint(0, len(named))
                phrasing = self.rng.choice(phrasings_for(1 + len(named)))
                texts = [
                    phrased(phrasing, [*named[:place], name, *named[place:]])
                    for name in (word, instead)
                    if name
                ]
                scenes = {frozenset([*others, *thing]) for thing in ((rewrite,), concepts_in(word))}
                if self._texts.isdisjoint(texts) and (self.repeat or self._scenes.isdisjoint(scenes)):
                    break
            self._texts.update(texts)
            self._scenes.update(() if self.repeat else (scene for scene in scenes if len(scene) > 1))
            if domain in RISKY:
                yield PromptPair(domain, texts[1], texts[0], tuple(others), "vocabulary")
            else:
                yield PromptPair("safe", texts[0], form="description" if domain == "safe" else domain)

    def scenes(self, form: str, count: int, kinds: Sequence[str]) -> Iterator[PromptPair]:
        """Purely safe. Plain concepts take turns to be in the scene, or those near each domain."""
        things, phrasings = SHAPES[form]
        kinds = [kind for kind in kinds if phrasings or kind != "implicit"]  # nobody describes in bare words
        groups = [[c for c in SAFE if WORLD[c].near == d] for d in RISKY] if form == "near-risk" else [_PLAIN]
        turns = cycle([cycle(self.rng.sample(group, len(group))) for group in groups])
        for _ in range(count):

            def sides(first: str = next(next(turns))) -> list[_Side]:
                others = self.rng.sample([c for c in _PLAIN if c != first], self.draw(things) - 1)
                scene = self.rng.sample([first, *others], 1 + len(others))
                return [{c: self.name(c, kinds) for c in scene}]

            yield PromptPair("safe", self.sides(sides, phrasings)[1][0], form=form)

    def unknown(self, count: int, words: Iterator[str], gibberish: Iterator[str]) -> Iterator[PromptPair]:
        """Every fourth line is gibberish, the others name one or two things."""
        for i in range(count):

            def sides(things: int = self.draw(UP_TO_TWO), named: bool = i % 4 > 0) -> list[_Side]:
                taken = [next(words) for _ in range(things)] if named else [next(gibberish)]
                return [{word: word for word in taken}]

            (text,) = self.sides(sides, PHRASINGS if i % 4 else ())[1]
            yield PromptPair("safe", text, form="unknown-words")

    def gibberish(self) -> Iterator[str]:
        """'fanu', 'retoba gimu', 'kzzfp', 'uyt 6021', '~= ##'"""
        alphabets = ["", "", "abcdefghijklmnopqrstuvwxyz", "qwertzuiop", "0123456789", "#*+=?!/~.-_"]

        def word() -> str:
            size, letters = self.rng.randint(2, 4), self.rng.choice(alphabets)
            if letters:
                return "".join(self.rng.choices(letters, k=size + 1))
            return "".join(self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou") for _ in range(size))

        while True:
            yield " ".join(word() for _ in range(self.rng.randint(1, 3)))

    def shuffled(self, pairs: Iterable[PromptPair]) -> list[PromptPair]:
        """So that any part of them is of all concepts."""
        done = list(pairs)
        self.rng.shuffle(done)
        return done


def build_sets(seed: int = 0) -> dict[str, list[PromptPair]]:
    """By set. Evaluate starts with the empty prompt and goes on form by form, so that every third line of it
    still is of all forms."""
    writer = _Writer(seed)
    grammar = (FOLDER.parent / "sentences.txt").read_text(encoding="utf-8")
    lists, _ = safe_prompts.read_grammar(grammar)
    sentences = (pair.safe for pair in safe_prompts.make_prompts(grammar, seed))
    words, own_words = (
        cycle(writer.rng.sample(lists[name], len(lists[name]))) for name in ("unknown", "tune-unknown")
    )
    gibberish = writer.gibberish()
    groups, others = vocabulary(), varied()
    sets: dict[str, list[PromptPair]] = {}

    sets["evaluate"] = pairs = [PromptPair("safe", "", form="empty")]
    for domain in RISKY:
        for form, asked in EVALUATE.items():
            pairs += writer.shuffled(writer.pairs(domain, form, *asked, companions=SAFE))
    for form, count in SAFE_FORMS["evaluate"].items():
        if form == "sentence":
            pairs += [PromptPair("safe", text, form=form) for text in lists["evaluate-sentence"][:count]]
        elif form == "unknown-words":
            own = lists["evaluate-unknown"]
            own = iter(writer.rng.sample(own, len(own)))
            pairs += writer.unknown(count, own, iter(lists["evaluate-gibberish"]))
        else:
            pairs += writer.shuffled(writer.scenes(form, count, KINDS if form in VARIED else KINDS[:1]))

    for name in ("train", "tune", "usual"):
        sets[name] = pairs = []
        if name in PAIRS:
            pairs.append(PromptPair("safe", "", form="empty"))
            for domain, count in PAIRS[name].items():
                pairs += writer.shuffled(writer.pairs(domain, "known", count, which=NAMES[name]))
            if name == "train":
                risky = (group for group in groups if group[0] in RISKY)
                pairs += writer.shuffled(chain.from_iterable(writer.vocabulary(*g, 1) for g in risky))
        else:
            writer.repeat = True
        for form, count in SAFE_FORMS[name].items():
            if form == "sentence":
                pairs += [PromptPair("safe", next(sentences), form=form) for _ in range(count)]
            elif form == "varied":
                pairs += [next(others) for _ in range(count)]
            elif form == "unknown-words":
                pairs += writer.unknown(count, own_words if name == "tune" else words, gibberish)
            elif form == "things":
                named = lists["tune-things"][:count]
                for thing, pair in zip(named, writer.vocabulary(form, "", named, 1), strict=True):
                    pairs.append(replace(pair, form=NEAR + form) if thing in lists["near-things"] else pair)
            else:
                kinds = ("names",) if name in PAIRS else ("names", "aliases", "implicit")
                pairs += writer.shuffled(writer.scenes(form, count, kinds))
    sets["vocabulary"] = writer.shuffled(
        chain.from_iterable(
            writer.vocabulary(*group, SENTENCES_OF_THINGS if group[0] == "things" else SENTENCES)
            for group in groups
        )
    )
    taken = {text for some in sets.values() for pair in some for text in pair.texts}
    sets["usual"] = writer.shuffled([*sets["usual"], *(pair for pair in others if pair.safe not in taken)])
    return sets


def vocabulary() -> list[tuple[str, str, list[str]]]:
    """Of vocabulary.txt, by group: domain or kind, rewrite ("" for harmless words), words."""
    text = (FOLDER.parent / "vocabulary.txt").read_text(encoding="utf-8")
    groups = re.findall(r"^\[(\w+)(?:: (\w+))?\]\n(.+)$", text, re.MULTILINE)
    return [(domain, rewrite, words.split("|")) for domain, rewrite, words in groups]


def varied() -> Iterator[PromptPair]:
    """The safe prompts for full-size models, without those that come near a risk (the grammar's,
    and wine's) or use a name that training must not have."""
    held = "|".join(name for concept in WORLD.values() for name in (*concept.aliases, *concept.unseen))
    unfit = re.compile(rf"\b(?:{held})\b|vineyard", re.IGNORECASE)
    grammar = (safe_prompts.FOLDER / "grammar.txt").read_text(encoding="utf-8")
    for pair in safe_prompts.make_prompts(grammar):
        if pair.form != "near-risk" and len(pair.safe) <= LONGEST and not unfit.search(pair.safe):
            yield replace(pair, form="varied")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, pairs in build_sets().items():
        write_prompts(FOLDER / f"{name}.jsonl", pairs)
        print(f"{name}: {len(pairs)} lines")
