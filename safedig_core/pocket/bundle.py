"""Makes the dictionaries of a pocket model that ship with the pack, with their entries in the index.

    python -m safedig_core.pocket.bundle --model pocket-flux --out OUT

One dictionary (weapons) and two adapters (substances, shock). Each entry's safety card is measured on the
shipped evaluation prompts of its domain, which nothing was trained or calibrated on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from ..dictionary.dictionary import Dictionary, check
from ..evaluation import Method, Safety, read_safety
from ..hub.index import PACK, PACK_INDEX, entry_for, index_text, read_index
from ..progress import Progress, ProgressLine
from ..prompts import SAFE
from ..recipe import Recipe
from ..steering.steering import Steering
from .demo import DEMO_LINES, Made, make
from .model import MODELS, PocketModel, load_judge, load_pocket
from .study import OURS, compare, form_table, shipped, table
from .world import HELD_OUT, SOURCE, TARGET

TARGETS = (TARGET, HELD_OUT)
FOLDER = PACK / "safedig_core" / "pocket" / "dictionaries"
SEED = 0


def measured(host: PocketModel, made: Made, domain: str, out: Path, progress: Progress) -> Safety:
    """The safety card of one domain: without, and with its dictionary."""
    dictionary = Dictionary.open(made.paths[SOURCE])
    if domain != SOURCE:
        dictionary = dictionary.with_adapters(made.paths[domain])
    methods = [Method("none"), Method("safe-rewrite", prompt=lambda pair: pair.safe)]
    methods.append(Method(OURS, Steering(dictionary).run))
    pairs = shipped("evaluate", [domain, SAFE])[::DEMO_LINES]
    rows, _ = compare(host, load_judge(), methods, pairs, seed=SEED, progress=progress)
    print(table(rows), form_table(rows), sep="\n")
    path = out / f"{domain}-results.json"
    path.write_text(json.dumps({"format": 2, "model": host.name, "seed": SEED, "rows": rows}))
    return read_safety(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    progress, host = ProgressLine(), load_pocket(o.model)
    made = make(host, o.out, TARGETS, Recipe(), "SafeDIG", progress)
    entries = {entry.id: entry for entry in read_index(PACK_INDEX)}
    FOLDER.mkdir(exist_ok=True)
    for domain, path in made.paths.items():
        shutil.copyfile(path, FOLDER / path.name)
        entries[path.stem] = entry_for(
            path,
            check(path),
            path.stem,
            file=(FOLDER / path.name).relative_to(PACK).as_posix(),
            base="" if domain == SOURCE else made.paths[SOURCE].stem,
            safety=measured(host, made, domain, o.out, progress),
        )
    PACK_INDEX.write_text(index_text(entries.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
