"""How close the two sides of the pairs are, in words or in a model's own tokens.

python -m safedig_core.prompt_pairs.lengths                       in words
python -m safedig_core.prompt_pairs.lengths TOKENIZER.JSON        in tokens; in ComfyUI's folder, T5's is
                                                                  comfy/text_encoders/t5_tokenizer/tokenizer.json
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from statistics import mean, median

from ..prompts import PromptPair, read_prompts

FOLDER = Path(__file__).parent

Split = Callable[[str], Sequence[str]]


def split_words(prompt: str) -> list[str]:
    return re.findall(r"[\w'-]+", prompt.lower())


@dataclass(frozen=True)
class Closeness:
    pairs: int
    equal: float  # share of pairs whose sides are equally long
    median_difference: float  # of lengths
    common: float  # mean share of the longer side that stays in its order


def closeness(pairs: Sequence[PromptPair], split: Split = split_words) -> Closeness:
    """Over pairs, each with an unsafe side."""
    sides = [(split(pair.unsafe or ""), split(pair.safe)) for pair in pairs]
    differences = [abs(len(unsafe) - len(safe)) for unsafe, safe in sides]
    return Closeness(
        len(sides),
        differences.count(0) / len(sides),
        median(differences),
        mean(common(unsafe, safe) / max(len(unsafe), len(safe)) for unsafe, safe in sides),
    )


def common(a: Sequence[str], b: Sequence[str]) -> int:
    blocks = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks)


def tokens_of(tokenizer: str) -> Split:
    """Splits by a tokenizer.json. Needs the package tokenizers, which comes with transformers."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(tokenizer)
    return lambda prompt: loaded.encode(prompt, add_special_tokens=False).tokens


def main() -> None:
    split = tokens_of(sys.argv[1]) if len(sys.argv) > 1 else split_words
    files = [path for path in sorted(FOLDER.glob("*.jsonl")) if path.stem != "safe"]
    by_name = {path.stem: read_prompts(path) for path in files}
    by_name["all"] = [pair for pairs in by_name.values() for pair in pairs]
    print(f"{'':18}pairs  equally long  median difference  in common")
    for name, pairs in by_name.items():
        c = closeness(pairs, split)
        print(f"{name:18}{c.pairs:5}{c.equal:14.1%}{c.median_difference:19g}{c.common:11.1%}")


if __name__ == "__main__":
    main()
