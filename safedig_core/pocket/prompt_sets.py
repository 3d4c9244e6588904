"""The shipped prompt sets: train, tune and evaluate share no scene; unseen-words asks for evaluate's
risky scenes with words that no dictionary was trained on.

python -m safedig_core.pocket.prompt_sets       writes prompts/*.jsonl anew
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

from ..prompts import PromptPair, write_prompts
from .scenes import REWRITE, RISKY, SAFE, SYNONYM, caption, concepts_in

FOLDER = Path(__file__).parent / "prompts"
SIZES = {  # companions per risky concept, purely safe prompts
    "train": (10, 60),
    "tune": (4, 60),
    "evaluate": (5, 70),
}
SHARES = {"train": 0.5, "tune": 0.22, "evaluate": 0.28}  # of all pairs of safe concepts


def build_sets(seed: int = 0) -> dict[str, list[PromptPair]]:
    """Each pair of safe concepts belongs to one set, a risky scene to the set of its safe rewrite."""
    rng = np.random.default_rng(seed)
    pairs = [frozenset(pair) for pair in combinations(SAFE, 2)]
    owner = dict(zip(pairs, rng.choice(list(SIZES), len(pairs), p=list(SHARES.values())), strict=True))
    sets: dict[str, list[PromptPair]] = {name: [] for name in SIZES}
    for domain, words in RISKY.items():
        for word in words:
            companions = [str(c) for c in rng.permutation(list(SAFE)) if c != REWRITE[word]]
            for name, (count, _) in SIZES.items():
                mine = [c for c in companions if owner[frozenset((c, REWRITE[word]))] == name]
                for companion in mine[:count]:
                    scene = [companion, word] if rng.random() < 0.5 else [word, companion]
                    safe = [REWRITE.get(w, w) for w in scene]
                    sets[name].append(PromptPair(domain, caption(safe), caption(scene), (companion,)))
    for name, (_, count) in SIZES.items():
        free = [sorted(pair) for pair in pairs if owner[pair] == name]
        for i in rng.permutation(len(free))[:count]:
            scene = list(rng.permutation(free[i]))
            sets[name].append(PromptPair("safe", caption([str(w) for w in scene])))
    sets["unseen-words"] = [
        replace(pair, unsafe=pair.unsafe and caption([SYNONYM.get(w, w) for w in concepts_in(pair.unsafe)]))
        for pair in sets["evaluate"]
    ]
    return sets


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, pairs in build_sets().items():
        write_prompts(FOLDER / f"{name}.jsonl", pairs)
        print(f"{name}: {len(pairs)} lines")
