"""The evaluation table of the pocket testbed: which methods are compared, and how."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..dictionary import Action, Dictionary
from ..evaluation import Method, Outcome, environment, row, run
from ..prompts import PromptPair, read_prompts
from ..steering import Steering
from .judge import Judge, risks
from .model import PocketModel, load_judge
from .prompt_sets import FOLDER
from .scenes import RISKY, concepts_in

Progress = Callable[[str, int, int], None]


def shipped(name: str, domains: Sequence[str]) -> list[PromptPair]:
    """A shipped prompt set (train, tune, evaluate), restricted to `domains`."""
    return [pair for pair in read_prompts(FOLDER / f"{name}.jsonl") if pair.domain in domains]


def paper_plan(positions: Sequence[str], strength: float = 0.2) -> list[Action]:
    """Eq. 16-18 as printed, with the paper's strengths: Blend and Repel, everywhere, ungated."""
    return [
        Action(p, operator, "paper", strength) for p in positions for operator in ("blend", "repel")
    ]


class MeanDifference:
    """A tap that adds g (mean safe - mean unsafe) to every token of one position."""

    def __init__(self, position: str, vector: Tensor, strength: float):
        self.positions = (position,)
        self._change = strength * vector

    def begin(self, images: int, steps: int) -> None:
        pass

    def step(self, index: int, sigma: float, rows: slice) -> None:
        self._rows = rows

    def __call__(self, position: str, a: Tensor) -> Tensor:
        out = a.clone()
        out[self._rows] += self._change
        return out


def negative_for(domain: str) -> str:
    """The risky words of a domain: a negative prompt written by somebody who knows the attack."""
    return " ".join(RISKY.get(domain, RISKY["weapons"]))


def compare(
    host: PocketModel,
    judge: Judge,
    methods: Sequence[Method],
    pairs: Sequence[PromptPair],
    *,
    seed: int = 0,
    images_per_prompt: int = 1,
    progress: Progress | None = None,
) -> tuple[list[dict], list[Outcome]]:
    """One row per method; the first must be the unsteered one."""
    rows, outcomes = [], []
    for method in methods:

        def report(done: int, total: int, name: str = method.name) -> None:
            if progress is not None:
                progress(f"evaluate {name}", done, total)

        outcome = run(
            host, judge, pairs, method, images_per_prompt=images_per_prompt, seed=seed, progress=report
        )
        outcomes.append(outcome)
        rows.append(row(outcome, outcomes[0], pairs, lambda seen: bool(risks(seen)), concepts_in))
    return rows, outcomes


def table(rows: Sequence[dict]) -> str:
    """The rows for people; shares in percent."""
    domains = [d for d in rows[0]["line_asr"] if d != "overall"]
    head = f"{'method':22}" + "".join(f"{d[:10]:>11}" for d in domains)
    head += f"{'overall':>9}{'kept':>7}{'safe seen':>11}{'identical':>11}{'artefacts':>11}{'fid':>7}{'time':>6}"
    lines = [head]
    for r in rows:
        line = f"{r['method']:22}" + "".join(f"{100 * r['line_asr'][d]:10.1f}%" for d in domains)
        line += f"{100 * r['line_asr']['overall']:8.1f}%{100 * r['safe_object_kept']:6.1f}%"
        line += f"{100 * r['safe_prompt_detected']:10.1f}%{100 * r['safe_prompt_identical']:10.1f}%"
        lines.append(line + f"{100 * r['artefact_rate']:10.1f}%{r['fid']:7.2f}{r['time_ratio']:6.2f}")
    return "\n".join(lines)


def results(model: str, seed: int, rows: list[dict]) -> dict:
    return {"format": 1, "model": model, "seed": seed, "rows": rows, "environment": environment()}
