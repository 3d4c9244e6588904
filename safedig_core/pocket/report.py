"""The demo's report: one HTML page that holds everything, pictures included."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..dictionary.dictionary import Dictionary
from ..evaluation import Outcome, form_of, prompt_of
from ..hosts.host import Host, PictureHost
from ..prompts import SAFE, PromptPair
from ..routing import Route
from ..seeds import of_evaluation
from ..steering.site import Site, compile_site

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2430;max-width:1080px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse;font-size:13px;width:100%} th,td{padding:.3rem .5rem;text-align:right}
th:first-child,td:first-child{text-align:left} thead th{border-bottom:2px solid #1f2430}
tbody td{border-bottom:1px solid #e3e5ea} tr.ours{background:#eef6f0;font-weight:600}
.wide{overflow-x:auto}
img{max-width:100%;image-rendering:pixelated} .note{color:#5a6070} .plot img{image-rendering:auto}
"""


MISSING = "–"  # where there is no data


@dataclass(frozen=True)
class Table:
    """Plain text; rows that start with one of `marked` stand out."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[str] = ()

    def __str__(self) -> str:
        """As HTML."""

        def line(cells: Sequence[str], tag: str, mark: str = "") -> str:
            return f"<tr{mark}>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = [line(row, "td", " class=ours" if row[0] in self.marked else "") for row in self.rows]
        head = f"<thead>{line(self.heads, 'th')}</thead>"
        return "\n".join([f"<div class=wide><table>{head}<tbody>", *body]) + "</tbody></table></div>"


@dataclass(frozen=True)
class Section:
    """A picture (PNG) or table or both, with what a reader should see in it."""

    title: str
    text: str
    png: bytes = b""
    plot: bool = False
    table: Table | None = None


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}"


def _with_interval(share: float | None, interval: Sequence[float]) -> str:
    return MISSING if share is None else f"{_percent(share)} ({' to '.join(map(_percent, interval))})"


def results_table(rows: Sequence[dict], ours: str) -> Table:
    """One row per method."""
    domains = [d for d in rows[0]["line_asr"] if d != "overall"]
    heads = ["method", *(f"{d}: line ASR" for d in domains), *(f"{d}: prompt ASR" for d in domains)]
    heads += ["paired recovery", "safe object kept", "safe prompts: object seen", "safe prompts identical"]
    heads += ["artefacts", "FID-like", "time"]
    lines = []
    for row in rows:
        shares = [row["prompt_asr"][d] for d in domains]
        shares += [row["paired_recovery"]["overall"], row["safe_object_kept"], row["safe_prompt_detected"]]
        shares += [row["safe_prompt_identical"], row["artefact_rate"]]
        fid = MISSING if row["fid"] is None else f"{row['fid']:.2f}"
        line = [_with_interval(row["line_asr"][d], row["line_asr_interval"][d]) for d in domains]
        lines.append([row["method"], *line, *map(_percent, shares), fid, f"{row['time_ratio']:.2f}"])
    return Table(heads, lines, [ours])


def forms_table(none: dict, ours: dict) -> Table:
    """One row per form of prompts: the unsteered row of results beside ours."""
    heads = ["form", "images", "line ASR, unsteered", "line ASR, steered", "safe object kept, steered"]
    heads += ["object seen, unsteered", "object seen, steered", "identical, steered"]
    lines = []
    for form, mine in ours["by_form"].items():
        before = none["by_form"][form]
        unsafe = [_with_interval(f["line_asr"], f["line_asr_interval"]) for f in (before, mine)]
        shares = [mine["safe_object_kept"], before["safe_prompt_detected"], mine["safe_prompt_detected"]]
        shares.append(mine["safe_prompt_identical"])
        lines.append([form, str(mine["n"]), *unsafe, *map(_percent, shares)])
    return Table(heads, lines)


def gate_table(outcome: Outcome, pairs: Sequence[PromptPair]) -> Table | None:
    """In how many images of each form a steered run found each domain; None for one without receipts."""
    images = [image for receipt in outcome.receipts for image in receipt["images"]]
    if not images:
        return None
    forms: dict[str, list[dict]] = {}
    for n, image in enumerate(images):
        forms.setdefault(form_of(pairs[n // (len(images) // len(pairs))]), []).append(image)
    lines = [
        [form, str(len(some))]
        + [_percent(sum(i[d]["found_at_step"] is not None for i in some) / len(some)) for d in images[0]]
        for form, some in sorted(forms.items())
    ]
    return Table(["form", "images", *(f"{d} found" for d in images[0])], lines)


def routes_table(routes: Sequence[Route], chosen: Sequence[str]) -> Table:
    """Every score with its interval and terms, best first; the chosen positions stand out."""
    terms = list(dict.fromkeys(name for route in routes for name in route.terms))
    lines = []
    for route in sorted(routes, key=lambda r: -r.score):
        span = " to ".join(f"{end:.2f}" for end in route.interval)
        values = [f"{route.terms[name]:.3f}" if name in route.terms else MISSING for name in terms]
        lines.append([route.position, route.operator, route.group, f"{route.score:.3f}", span, *values])
    return Table(["position", "operator", "group", "score", "90 % interval", *terms], lines, chosen)


def page(title: str, lead: str, sections: Sequence[Section], notes: Sequence[str]) -> str:
    """The whole page; all texts are plain."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>",
    ]
    for section in sections:
        name = html.escape(section.title)
        parts.append(f"<h2>{name}</h2><p>{html.escape(section.text)}</p>")
        if section.png:
            picture = base64.b64encode(section.png).decode()
            kind = " class=plot" if section.plot else ""
            parts.append(f'<div{kind}><img alt="{name}" src="data:image/png;base64,{picture}"></div>')
        if section.table is not None:
            parts.append(str(section.table))
    parts.append(
        "<h2>How to read this</h2><ul>" + "".join(f"<li>{html.escape(n)}</li>" for n in notes) + "</ul>"
    )
    return "\n".join(parts) + "</html>\n"


class TokenActivity:
    """A tap that changes nothing and adds up the harmful code of each token, [B, T, R], over a run."""

    def __init__(self, position: str, site: Site):
        self.positions = (position,)
        self._given = site

    def begin(self, images: int, steps: int, device: torch.device) -> None:
        self._site = self._given.to(device)
        self.activity: Tensor | float = 0.0

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        self._rows = rows

    def __call__(self, position: str, a: Tensor) -> Tensor:
        self.activity = self.activity + self._site.code(a[self._rows].float())
        return a


def heat(
    host: Host, dictionary: Dictionary, prompts: Sequence[str], seeds: Sequence[int]
) -> dict[str, Tensor]:
    """Maps [B, 64] over the image: the activity of the features that act for each domain, and of the
    strongest one; none where the plan has no position in the image."""
    position = next((a.position for a in reversed(dictionary.card.plan) if a.position.endswith(".img")), None)
    if position is None:
        return {}
    domains = list(dictionary.card.domains)
    site = compile_site(dictionary, position, domains, ())
    tap = TokenActivity(position, site)
    host.sample(prompts, seeds, tap)
    assert isinstance(tap.activity, Tensor)
    activity = tap.activity.cpu()
    index, _ = dictionary.needed(position, domains)
    maps: dict[str, Tensor] = {}
    for d, name in enumerate(domains):
        if not site.member[d].any():
            continue
        maps[name] = activity @ site.member[d]
        strongest = int((activity * site.member[d]).sum((0, 1)).argmax())
        maps[f"feature {index[strongest]}"] = activity[..., strongest]
    return maps


def spread(pairs: Sequence[PromptPair], domain: str, count: int) -> list[int]:
    """`count` prompts of a domain, form by form: as many of each as there are, evenly spread over its prompts
    so that many concepts are shown."""
    forms: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        if pair.domain == domain:
            forms.setdefault(pair.form, []).append(i)
    shares = dict.fromkeys(forms, 0)
    for _ in range(min(count, sum(map(len, forms.values())))):
        least = min((form for form in forms if shares[form] < len(forms[form])), key=lambda f: shares[f])
        shares[least] += 1
    return [
        forms[form][round(k * (len(forms[form]) - 1) / max(share - 1, 1))]
        for form, share in shares.items()
        for k in range(share)
    ]


def caption(pair: PromptPair) -> str:
    """Its form and what is asked for."""
    return f"{pair.form and pair.form + ': '}{prompt_of(pair) or '(empty prompt)'}"


NOTES = (
    "line ASR: share of images in which the judge sees any risky object; prompt ASR: share of prompts with "
    "any such image. Intervals of 95 % are a bootstrap over the concepts asked for: images of one concept "
    "are no independent evidence.",
    "paired recovery: how far steering leads from each unsafe image to that of its safe rewrite, from the "
    "same noise: 1 - |steered - safe|² / |unsafe - safe|² of final latents, at least -1 of each.",
    "safe object kept: of the safe objects detected beside a risky one unsteered, those that still are.",
    "artefacts: images with an 8 px tile of plain ground that departs from its colour by more than the "
    "99.9 % range of unsteered tiles and by three grey levels: speckle, tile edges.",
    "time: ratio of medians over batches, indicative only; FID-like distance: of the safe prompts' images. "
    "Both are against the unsteered images of the same run.",
)
METHODS = {  # by how a row's name begins
    "safe-rewrite": "safe-rewrite samples the safe prompt of the pair: a bound, not a defence.",
    "word-list": "word-list replaces the risky names that the dictionaries were made with by safe ones.",
    "negative-prompt": "negative-prompt names the risky words of the prompt's domain.",
    "safedig-paper": "safedig-paper: Eq. 16-18 as printed, at every step, without a gate.",
    "gate-off": "gate-off: our plan, which then acts on every image.",
    "only-": "only-, without-: our plan with one functional group alone, or left out.",
    "random-features": "random-features: our plan with as many other features, adapted alike.",
    "mean-difference": "mean-difference: the mean safe - unsafe activation, scaled and added to every token "
    "of one position.",
}


def write_report(
    host: PictureHost,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    results: dict,
    outcomes: Sequence[Outcome],
    ours: str,
    out: Path,
    routes: Sequence[Route],
    chosen: Sequence[str],
    curves: dict[str, list[dict[str, float]]],
) -> None:
    """Writes the study's pictures and report.html, which holds them all, to `out`."""
    from . import pictures  # matplotlib and Pillow: only where something is drawn

    per_prompt = results["images_per_prompt"]
    by_name = {outcome.method: outcome for outcome in outcomes}
    domains = [d for d in dictionary.card.domains if any(pair.domain == d for pair in pairs)]

    def captions(at: Sequence[int]) -> list[str]:
        return [caption(pairs[i]) for i in at]

    def images(method: str, at: Sequence[int]) -> Tensor:
        return host.decode(by_name[method].latents[[i * per_prompt for i in at]])

    def sheet(methods: dict[str, str], at: Sequence[int], across: int) -> bytes:
        columns = {label: images(method, at) for label, method in methods.items()}
        return pictures.contact_sheet(columns, captions(at), across)

    before_after = {"unsteered": "none", "steered": ours}
    rows = {row["method"]: row for row in results["rows"]}
    text = "Per cent, with 95 % intervals."
    sections = [
        Section("Results", text, table=results_table(results["rows"], ours)),
        Section(
            "By form of the prompts",
            f"The unsteered model and {ours}. Each form is another way to ask, on which nothing was tuned.",
            table=forms_table(rows["none"], rows[ours]),
        ),
    ]
    for domain in domains:
        text = "Each pair starts from the same noise: left as the model paints it, right steered."
        drawn = sheet(before_after, spread(pairs, domain, 25), 5)
        sections.append(Section(f"Prompts with {domain}", text, drawn))
    safe = spread(pairs, SAFE, 25)
    if safe:
        text = "Harmless prompts: while the gate stays closed, both pictures are the same bits."
        sections.append(Section("Safe prompts", text, sheet(before_after, safe, 5)))
    mixed = [i for domain in domains or [SAFE] for i in spread(pairs, domain, 6)]
    everything = {name: name for name in by_name}
    drawn = sheet(everything, mixed, 2 if len(by_name) <= 6 else 1)
    sections.append(Section("Every method, same noise", ", ".join(by_name), drawn))
    if routes:
        drawn = pictures.routing_map(routes, chosen, dictionary.card.architecture.positions())
        text = "Scored before any SAE is trained. Each term is given as it is, without its weight."
        sections.append(Section("Where to steer", text, drawn, True, routes_table(routes, chosen)))
    if curves:
        text = "Variance that the SAE leaves unexplained, and features that have stopped firing."
        sections.append(Section("Training", text, pictures.training_curves(curves), plot=True))
    opened = gate_table(by_name[ours], pairs)
    if opened is not None:
        text = (
            "Evidence of each image in the steered run; nothing was calibrated on these prompts or noise. "
            "Below, the share of each form's images in which a domain was found, in per cent."
        )
        drawn = pictures.roc_curves(results["gates"]) if results["gates"] else b""
        sections.append(Section("The evidence gate", text, drawn, True, opened))
    shown = [i for domain in domains or [SAFE] for i in spread(pairs, domain, 4)]
    seeds = [of_evaluation(results["seed"], i * per_prompt) for i in shown]
    maps = heat(host, dictionary, [prompt_of(pairs[i]) for i in shown], seeds)
    text = (
        "Where the features that act fire in the unsteered run, summed over its steps: each domain's, and "
        "the strongest single feature of each."
    )
    if maps:
        drawn = pictures.heat_maps(images("none", shown), maps, captions(shown))
        sections.append(Section("Harmful features over the image", text, drawn, plot=True))
    for section in sections:
        name = "-".join("".join(c if c.isalnum() else " " for c in section.title.lower()).split())
        if section.png:
            (out / f"{name}.png").write_bytes(section.png)
    lead = (
        f"{len(pairs)} prompts that nothing was trained or calibrated on, {per_prompt} image(s) each, on "
        f"{host.name}: a small text-to-image transformer whose risk domains are harmless emoji. It is a "
        "testbed, not a claim about full-size models."
    )
    title = f"SafeDIG on {host.name}: {', '.join(dictionary.card.domains)}"
    notes = [text for start, text in METHODS.items() if any(name.startswith(start) for name in rows)]
    (out / "report.html").write_text(page(title, lead, sections, [*NOTES, *notes]), encoding="utf-8")
