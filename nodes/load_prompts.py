"""Load Prompt Pairs: unsafe prompts beside their safe rewrites, from a file."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from . import sockets

if TYPE_CHECKING:
    from ..safedig_core.prompts import PromptPair

CORE = Path(__file__).parent.parent / "safedig_core"
SHIPPED = {"": CORE / "prompt_pairs", "pocket ": CORE / "pocket" / "prompts"}
ENDINGS = (".jsonl", ".csv")


def files() -> dict[str, Path]:
    """Prompt files of the input folder and those that ship with the pack, by the name to choose them by."""
    import folder_paths

    folder = Path(folder_paths.get_input_directory())
    found: dict[str, Path] = {}
    for inside, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(ENDINGS):
                path = Path(inside, name)
                found[path.relative_to(folder).as_posix()] = path
    for group, shipped in SHIPPED.items():
        found |= {f"{group}{path.stem} (shipped)": path for path in sorted(shipped.glob("*.jsonl"))}
    return found


def path_of(name: str) -> Path:
    """Raises ValueError where there is no such file."""
    path = files().get(name)
    if path is None:
        raise ValueError(f"There is no prompt file '{name}' in ComfyUI's input folder: put it there.")
    return path


class LoadPromptPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGLoadPromptPairs",
            display_name="Load Prompt Pairs",
            category=sockets.MAKING,
            description="Reads pairs of an unsafe prompt and its safe rewrite, each with its risk domain, "
            "from a JSONL or CSV file with the columns domain, unsafe, safe.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list(files()),
                    tooltip="A .jsonl or .csv file of ComfyUI's input folder, or one that ships with it.",
                ),
                io.String.Input(
                    "domains",
                    default="",
                    tooltip="Only these risk domains, such as: weapons, safe. Empty: all. 'safe' are prompts "
                    "without any risk.",
                ),
                io.Int.Input(
                    "skip_per_domain",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="Leaves out the first so many of each domain: what another loader takes.",
                ),
                io.Int.Input(
                    "most_per_domain",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="Takes so many of each domain after those. 0: all the rest.",
                ),
                sockets.Prompts.Input("prompts", optional=True, tooltip="Pairs to put before these."),
            ],
            outputs=[
                sockets.Prompts.Output(display_name="prompts"),
                io.String.Output(
                    display_name="texts",
                    is_output_list=True,
                    tooltip="Every prompt, for a text encoder of your choice between here and Capture "
                    "Activations. Not needed where that has a CLIP.",
                ),
            ],
            **sockets.found_by(
                "unsafe prompts, NSFW prompts, prompt dataset, JSONL, CSV, I2P, SAE training data"
            ),
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **others: object) -> str:
        """Reads again when the file has changed."""
        stat = path_of(file).stat()
        return f"{file} {stat.st_size} {stat.st_mtime_ns}"

    @classmethod
    def execute(
        cls, file: str, domains: str, skip_per_domain: int, most_per_domain: int, prompts=None
    ) -> io.NodeOutput:
        from ..safedig_core.prompts import read_prompts
        from .bridge.chain import names_in, texts_of

        read = read_prompts(path_of(file))
        pairs = chosen(read, names_in(domains), skip_per_domain, most_per_domain, file)
        pairs = [*(prompts or ()), *pairs]
        again = Counter((pair.unsafe, pair.safe) for pair in pairs).most_common(1)
        if again and again[0][1] > 1:
            raise ValueError(
                f"{file} has the pair '{again[0][0][1][:60]}', which was loaded before: remove one."
            )
        counts = Counter(pair.domain for pair in pairs)
        text = "\n".join(f"{domain}: {count}" for domain, count in counts.items())
        return io.NodeOutput(pairs, texts_of(pairs), ui=ui.PreviewText(text))


def chosen(pairs: list[PromptPair], domains: list[str], skip: int, most: int, name: str) -> list[PromptPair]:
    """Of each of these domains (none: all) the pairs after the first `skip`, `most` at most (0: all).

    Raises ValueError for a domain that isn't there, and where none is left.
    """
    there = {pair.domain for pair in pairs}
    for domain in domains:
        if domain not in there:
            raise ValueError(f"{name} has no domain '{domain[:60]}', only {', '.join(sorted(there))}.")
    seen: Counter[str] = Counter()
    kept = []
    for pair in pairs:
        seen[pair.domain] += 1
        place = seen[pair.domain] - skip
        if (not domains or pair.domain in domains) and place > 0 and (most == 0 or place <= most):
            kept.append(pair)
    if not kept:
        raise ValueError(f"Nothing of {name} is left when the first {skip} of each domain are left out.")
    return kept
