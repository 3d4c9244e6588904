"""The safe prompts, from grammar.txt: the same for everybody, no two alike.

python -m safedig_core.prompt_pairs.safe_prompts       writes safe.jsonl anew
"""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

from ..prompts import SAFE, PromptPair, write_prompts
from .lengths import split_words

FOLDER = Path(__file__).parent
ALIKE = 0.7  # two prompts that share this part of their words are alike
TRIES = 200  # for one prompt that is like no other

Lists = dict[str, list[str]]


def words(prompt: str) -> frozenset[str]:
    return frozenset(split_words(prompt) or prompt.split())


def read_grammar(text: str) -> tuple[Lists, dict[str, tuple[int, list[str]]]]:
    """The lists by name, then how many prompts and which lines each form has."""
    lists: Lists = {}
    forms: dict[str, tuple[int, list[str]]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("= "):
            lines = lists.setdefault(line[2:], [])
        elif line.startswith(": "):
            name, count = line[2:].split()
            _, lines = forms.setdefault(name, (int(count), []))
        elif line and not line.startswith("# "):
            lines.append(line)
    return {name: " | ".join(some).split(" | ") for name, some in lists.items()}, forms


def expand(line: str, lists: Lists, rng: Random) -> str:
    """The line with every {name} replaced, by something else each time."""
    used: set[str] = set()
    while slot := re.search(r"\{(?!a\})([\w-]+)\}", line):
        choice = rng.choice([item for item in lists[slot[1]] if item not in used])
        used.add(choice)
        line = line[: slot.start()] + choice + line[slot.end() :]
    line = re.sub(r"\{a\} (?=[\"(]*(?:[aeioAEIO]|u(?!ni|ku)))", "an ", line)
    return line.replace("{a}", "a")


def make_prompts(grammar: str, seed: int = 0) -> list[PromptPair]:
    """In mixed order, so that any part of them holds all forms."""
    lists, forms = read_grammar(grammar)
    rng = Random(seed)
    pairs: list[PromptPair] = []
    seen: dict[int, list[frozenset[str]]] = {}  # by how many words: prompts alike have nearly as many

    def add(prompt: str, form: str) -> bool:
        new = words(prompt)
        for size, old in seen.items():
            if min(size, len(new)) >= ALIKE * max(size, len(new)):
                most = ALIKE * (size + len(new)) / (1 + ALIKE)  # words in both, where the share is ALIKE
                if any(len(new & some) >= most for some in old):
                    return False
        seen.setdefault(len(new), []).append(new)
        pairs.append(PromptPair(SAFE, prompt, form=form))
        return True

    for form, (count, lines) in forms.items():
        fixed = [line for line in lines if "{" not in line]
        open_lines = [line for line in lines if "{" in line]
        for line in fixed:
            if not add(line, form):
                raise ValueError(f"{line!r} is like another prompt: remove one")
        for i in range(count - len(fixed)):
            # Lines take turns; one that has run out of new prompts leaves its turn to the next.
            turns = (open_lines[(i + t) % len(open_lines)] for t in range(TRIES))
            if not any(add(expand(line, lists, rng), form) for line in turns):
                raise ValueError(f"the form {form!r} yields fewer than {count} prompts")
    rng.shuffle(pairs)
    return pairs


def main() -> None:
    grammar = (FOLDER / "grammar.txt").read_text(encoding="utf-8")
    write_prompts(FOLDER / "safe.jsonl", make_prompts(grammar))


if __name__ == "__main__":
    main()
