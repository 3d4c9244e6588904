"""A published dictionary's page on the Hub: README.md, written from its card and index entry."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..dictionary.card import Card
from ..evaluation import Row, Safety
from .index import Entry

_HOME = "https://arxiv.org/abs/2605.30049"
_MISSING = "–"  # where nothing was measured
# those that the Hub knows by these names
_LICENCES = {"apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"}


def model_card(card: Card, entry: Entry) -> str:
    """Markdown with the Hub's YAML head."""
    kind = card.kind
    parts = [
        _head(card),
        f"# {_text(entry.title)}",
        f"A [SafeDIG]({_HOME}) {kind} for ComfyUI. It steers a {card.architecture.describe()} away from "
        f"**{', '.join(card.domains)}** while it samples. By {_text(card.creator) or 'unknown'}.",
        _use(entry, card),
        "## Domains\n\n" + _domains(card),
        "## Plan\n\n" + _plan(card),
        "## Measured\n\n" + _measured(entry.safety),
    ]
    if card.positions:
        parts.append("## Autoencoders\n\n" + _autoencoders(card))
    parts += [
        "## Limits\n\n" + _limits(card, entry.safety),
        "## Licence and origin\n\n" + _origin(card, entry),
    ]
    return "\n\n".join(parts) + "\n"


def _head(card: Card) -> str:
    licence = re.sub(r"[^a-z0-9.-]+", "-", card.licence["weights"].lower()).strip("-")
    known = (
        [f"license: {licence}"]
        if licence in _LICENCES
        else ["license: other", f"license_name: {licence or 'unnamed'}"]
    )
    tags = ["safedig", "comfyui", "safety", "sparse-autoencoder", card.architecture.family]
    return "\n".join(["---", *known, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _use(entry: Entry, card: Card) -> str:
    steps = "In ComfyUI with SafeDIG, paste this into *reference* of **Load SafeDIG Dictionary**"
    if card.kind == "adapter":
        steps += f", and connect the dictionary `{entry.base}` to its *base*"
    return f"## Use\n\n{steps}:\n\n```\n{entry.reference}\n```\n\nIt names these bytes for good."


def _domains(card: Card) -> str:
    rows = []
    for name, domain in card.domains.items():
        features = ", ".join(f"{len(found)} at {position}" for position, found in domain.features.items())
        if domain.gate is None:
            gate = "none"
        else:
            rate, prompts = domain.gate.false_positive_rate, domain.gate.prompts
            gate = f"opened by {rate:.1%} of {prompts} safe prompts"
            forms = ", ".join(f"{form} {opened}/{of}" for form, (opened, of) in domain.gate.forms.items())
            gate += f" ({forms})" if forms else ""
        rows.append([name, features or "none", gate])
    return _table(["domain", "features that act", "gate"], rows)


def _plan(card: Card) -> str:
    if not card.plan:
        return "None: choose positions with *Select Positions*."
    rows = []
    for a in card.plan:
        score = ", ".join(f"{name} {value:.2f}" for name, value in a.score.items())
        rows.append(
            [a.position, a.operator, a.form, f"{a.strength:g}", f"{a.window[0]:g} to {a.window[1]:g}",
             a.domain or "all", score or "none"]
        )  # fmt: skip
    heads = ["position", "operator", "form", "strength", "noise levels", "for domain", "routing scores"]
    return _table(heads, rows)


def _measured(safety: Safety | None) -> str:
    if safety is None:
        return "Nothing was measured. Try it on your own prompts before you rely on it."
    domains = sorted({domain for row in safety.rows for domain in row.line_asr})
    rows = []
    for row in safety.rows:
        unsafe = [_range(row.line_asr.get(d), row.line_asr_interval.get(d, (0.0, 1.0))) for d in domains]
        shares = (
            row.paired_recovery.get("overall"),
            row.safe_object_kept,
            row.safe_prompt_identical,
            row.safe_prompt_detected,
            row.artefact_rate,
        )
        fid = _MISSING if row.fid is None else f"{row.fid:.2f}"
        rows.append(
            [row.method, str(row.n_images), *unsafe, *map(_percent, shares), fid, f"{row.time_ratio:.2f}"]
        )
    heads = ["method", "images", *(f"{domain}: still unsafe" for domain in domains)]
    heads += ["recovered", "safe object kept", "safe prompts identical", "safe prompts: object seen"]
    heads += ["artefacts", "FID-like", "time"]
    parts = [
        f"On {_text(safety.model)}, evaluation seed {safety.seed}, with `python -m safedig_core evaluate`. "
        "Shares of pictures, with 95 % intervals (bootstrap over the concepts asked for); *recovered* is how "
        "far steering leads from the unsafe picture to that of its safe rewrite; FID-like distance and time "
        "(indicative) against the unsteered model (`none`).",
        _table(heads, rows),
        *_judges(safety),
    ]
    for row in safety.rows:
        if row.by_form and row.method != "none":
            parts += [f"{_text(row.method)}, by form of the prompts:", _by_form(row)]
    return "\n\n".join(parts)


def _judges(safety: Safety) -> list[str]:
    """Who said what is unsafe, from which scores on; and how well pictures fit their prompts."""
    lines = []
    for e in safety.evaluators:
        over = ", ".join(f"{name} from {limit:g}" for name, limit in e.thresholds.items())
        lines.append(f"{_text(e.name)} {_text(e.version)}" + (f": {_text(over)}" if over else ""))
    fits = [f"{_text(r.method)} {name} {value:.1f}" for r in safety.rows for name, value in r.fit.items()]
    if fits:
        lines.append(f"how well pictures of safe prompts fit them: {', '.join(fits)}")
    if lines:
        return ["Judged by:\n\n" + "\n".join(f"- {line}" for line in lines)]
    if all(share is None for row in safety.rows for share in row.line_asr.values()):
        return ["Judged by nobody: what is unsafe in these pictures is not known."]
    return []


def _by_form(row: Row) -> str:
    heads = ["form", "images", "still unsafe", "safe object kept", "identical", "object seen"]
    lines = []
    for name, form in row.by_form.items():
        shares = form.safe_object_kept, form.safe_prompt_identical, form.safe_prompt_detected
        unsafe = _range(form.line_asr, form.line_asr_interval)
        lines.append([name, str(form.n), unsafe, *map(_percent, shares)])
    return _table(heads, lines)


def _percent(share: float | None) -> str:
    return _MISSING if share is None else f"{share:.1%}"


def _range(share: float | None, interval: Sequence[float]) -> str:
    return _MISSING if share is None else f"{share:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def _autoencoders(card: Card) -> str:
    rows = []
    for name, info in card.positions.items():
        quality = ", ".join(f"{key} {value:.3g}" for key, value in info.quality.items())
        rows.append([name, str(info.prefix), quality or "not measured"])
    return _table(["position", "features that act or tell", "quality"], rows)


def _limits(card: Card, safety: Safety | None) -> str:
    lines = [
        "It lowers the share of unsafe pictures; it does not bring it to zero, and it is no filter of "
        "prompts or pictures.",
        f"It knows only {', '.join(card.domains)}. Other risks pass as they are.",
        f"It fits a {card.architecture.describe()} and is refused by any other. Fine-tunes of that model may "
        "respond otherwise than what was measured.",
        "Gates were calibrated on the prompts of the table above; prompts of another kind may open them more "
        "or less often.",
    ]
    if safety is not None:
        lines.append(f"The figures are of {_text(safety.model)} and its evaluation prompts alone.")
    return "\n".join(f"- {line}" for line in lines)


def _origin(card: Card, entry: Entry) -> str:
    lines = [
        f"weights: {_text(card.licence['weights'])}",
        f"data: {_text(card.licence['data']) or 'not stated'}",
        f"file: {entry.size} bytes, SHA-256 `{entry.sha256}`",
    ]
    if card.source_sha256:
        lines.append(f"trained on prompts with SHA-256 `{card.source_sha256}`")
    if card.base_sha256:
        lines.append(f"for the dictionary with SHA-256 `{card.base_sha256}` and no other")
    return "\n".join(f"- {line}" for line in lines)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines)


def _text(value: str) -> str:
    """As plain text in Markdown: on one line, without tags, links, code or cells of its own."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(value.split()))
