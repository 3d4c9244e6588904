"""Measures a dictionary on any model that can be sampled: rows, results and a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .dictionary.dictionary import Dictionary
from .evaluation import (
    FORMAT,
    Method,
    Outcome,
    environment,
    form_of,
    image_entries,
    prompt_of,
    row,
    run_in_turns,
)
from .evaluators import Panel
from .files import digest, need
from .hosts.host import PictureHost
from .progress import Progress
from .prompts import PromptPair, fingerprint
from .sheets import shrunk, write_report
from .steering.calibration import in_force_on, variant_of
from .steering.steering import Steering

OURS = "safedig-residual"
REWRITE = "safe-rewrite"
SHOWN = 48  # pictures of each method in the report, at most


def evaluate_on(
    host: PictureHost,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    panel: Panel,
    *,
    seed: int,
    images_per_prompt: int,
    out: Path,
    unblurred: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Writes results.json, pictures and report.html to `out`, and returns the results.

    Each prompt is sampled unsteered, as its safe rewrite and steered, from the same noise and in turns;
    latents stay in `out`/samples, and are taken up when the same is asked for again. A prompt whose safe one
    is the same has no rewrite: nothing is said of its recovery. Raises ValueError where the dictionary
    doesn't fit.
    """
    dictionary.check_fits(host.architecture)
    need(pairs, "there are no prompts to evaluate on")
    force, steering = in_force_on(host, dictionary), Steering(dictionary)
    steered = Method(OURS, partial(steering.run, thresholds=force.thresholds))
    methods = [Method("none"), steered]
    if any(pair.unsafe not in (None, pair.safe) for pair in pairs):
        methods.insert(1, Method(REWRITE, prompt=lambda pair: pair.safe))
    files = dictionary.sha256, dictionary.adapter_sha256, force.thresholds
    run = digest(variant_of(host), *files, fingerprint(pairs), images_per_prompt, seed)[:16]
    outcomes = run_in_turns(
        host, panel, pairs, methods, images_per_prompt=images_per_prompt, seed=seed, batch=host.batch,
        keep=out / "samples" / run, progress=partial(progress, "evaluate"),
    )  # fmt: skip
    safe = next((o for o in outcomes if o.method == REWRITE), None)
    risky = bool if panel.tells_risk else None
    rows = [row(outcome, outcomes[0], pairs, risky, lambda prompt: (), safe) for outcome in outcomes]
    results = {
        "format": FORMAT,
        "model": host.name,
        "seed": seed,
        "rows": rows,
        "images": [
            entry for o in outcomes for entry in image_entries(o, outcomes[0], pairs, images_per_prompt, seed)
        ],
        "evaluators": panel.about,
        "calibration": asdict(force),
        "images_per_prompt": images_per_prompt,
        "environment": environment(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _report(host, dictionary, pairs, outcomes, results, out, unblurred)
    return results


def _report(
    host: PictureHost,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    outcomes: Sequence[Outcome],
    results: dict[str, Any],
    out: Path,
    unblurred: bool,
) -> None:
    from .pocket.report import forms_table, results_table

    rows = {row["method"]: row for row in results["rows"]}
    count = min(SHOWN, len(pairs))
    at = [i * len(pairs) // count for i in range(count)]

    def pictures(outcome: Outcome) -> torch.Tensor:
        latents = outcome.latents[[i * results["images_per_prompt"] for i in at]]
        return torch.cat([shrunk(host.decode(part).cpu()) for part in latents.split(host.batch)])

    tables = [str(results_table(results["rows"], OURS)), str(forms_table(rows["none"], rows[OURS]))]
    write_report(
        out,
        f"{', '.join(dictionary.card.domains)} on {host.name}",
        f"{len(pairs)} prompts, evaluation seed {results['seed']}. Judged by: {judged_by(results)}. "
        f"Gate: {results['calibration']['text']}.",
        tables,
        {outcome.method: pictures(outcome) for outcome in outcomes},
        [f"{form_of(pairs[i])}: {prompt_of(pairs[i])}" for i in at],
        unblurred,
    )


def judged_by(results: dict[str, Any]) -> str:
    """The evaluators in words."""
    names = [f"{e['name']} {e['version']}" for e in results["evaluators"]]
    return ", ".join(names) or "nobody: without an evaluator nothing is said of what is unsafe"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people; - where there is no data."""
    lines = [f"{'method':20}{'unsafe':>9}{'recovery':>10}{'identical':>11}{'time':>7}  fit"]
    for r in rows:
        shares = r["line_asr"]["overall"], r["paired_recovery"]["overall"], r["safe_prompt_identical"]
        cells = ["-" if share is None else f"{100 * share:.1f}%" for share in shares]
        fit = ", ".join(f"{name} {value:.1f}" for name, value in r["fit"].items())
        lines.append(
            f"{r['method']:20}{cells[0]:>9}{cells[1]:>10}{cells[2]:>11}{r['time_ratio']:7.2f}  {fit or '-'}"
        )
    return "\n".join(lines)
