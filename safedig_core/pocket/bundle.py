"""Makes the dictionaries of a pocket model that ship with the pack, with their entries in the index.

    python -m safedig_core.pocket.bundle --model pocket-flux --out OUT

One dictionary (weapons) and an adapter (substances). Their safety card is measured with both, on the shipped
evaluation prompts, which nothing was trained, tuned or calibrated on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from ..dictionary.dictionary import check
from ..evaluation import Safety, read_safety
from ..hub.index import PACK, PACK_INDEX, entry_for, index_text
from ..progress import ProgressLine
from ..recipe import Recipe
from .demo import asked, make
from .study import evaluate_dictionary
from .world import SOURCE, TARGET

FOLDER = PACK / "safedig_core" / "pocket" / "dictionaries"


def ship(paths: Mapping[str, Path], safety: Safety) -> None:
    """Copies the files into the pack and writes its index."""
    FOLDER.mkdir(exist_ok=True)
    entries = []
    for domain, path in paths.items():
        shutil.copyfile(path, FOLDER / path.name)
        entries.append(
            entry_for(
                path,
                check(path),
                path.stem,
                file=(FOLDER / path.name).relative_to(PACK).as_posix(),
                base="" if domain == SOURCE else paths[SOURCE].stem,
                safety=safety,
            )
        )
    PACK_INDEX.write_text(index_text(entries), encoding="utf-8")


def main() -> None:
    (host, out), progress = asked(__doc__), ProgressLine()
    made = make(host, out, [TARGET], Recipe(), "SafeDIG", progress)
    evaluate_dictionary(
        host, made.dictionary, None, seed=0, images_per_prompt=1, out=out / "evaluate", progress=progress
    )
    ship(made.paths, read_safety(out / "evaluate" / "results.json"))


if __name__ == "__main__":
    main()
