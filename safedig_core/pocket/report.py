"""The demo's report: one HTML page that holds everything, pictures included."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2430;max-width:1080px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse;font-size:13px;width:100%} th,td{padding:.3rem .5rem;text-align:right}
th:first-child,td:first-child{text-align:left} thead th{border-bottom:2px solid #1f2430}
tbody td{border-bottom:1px solid #e3e5ea} tr.ours{background:#eef6f0;font-weight:600}
img{max-width:100%;image-rendering:pixelated} .note{color:#5a6070} .plot img{image-rendering:auto}
"""


@dataclass(frozen=True)
class Figure:
    """A picture (PNG) with what a reader should see in it."""

    title: str
    text: str
    png: bytes
    plot: bool = False


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _cell_with_interval(row: dict, domain: str) -> str:
    low, high = row["line_asr_interval"][domain]
    return f"{_percent(row['line_asr'][domain])} <span class=note>({_percent(low)} to {_percent(high)})</span>"


def _table(rows: Sequence[dict], ours: str) -> str:
    domains = [d for d in rows[0]["line_asr"] if d != "overall"]
    heads = ["method", *(f"{d}: line ASR" for d in domains), *(f"{d}: prompt ASR" for d in domains)]
    heads += ["safe object kept", "safe prompts: object seen", "safe prompts identical", "artefacts", "FID-like", "time"]
    lines = ["<table><thead><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in heads) + "</tr></thead><tbody>"]
    for row in rows:
        cells = [html.escape(row["method"])]
        cells += [_cell_with_interval(row, d) for d in domains]
        cells += [_percent(row["prompt_asr"][d]) for d in domains]
        cells += [
            _percent(row[name])
            for name in (
                "safe_object_kept", "safe_prompt_detected", "safe_prompt_identical", "artefact_rate"
            )
        ]  # fmt: skip
        cells += [f"{row['fid']:.2f}", f"{row['time_ratio']:.2f}"]
        mark = " class=ours" if row["method"] == ours else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return "\n".join(lines) + "</tbody></table>"


def page(title: str, lead: str, rows: Sequence[dict], ours: str, figures: Sequence[Figure], notes: Sequence[str]) -> str:
    """The whole page; `lead` and `notes` are plain text."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>",
        "<h2>Results</h2><p class=note>Per cent, with 95 % Wilson intervals; time and FID-like distance "
        "against the unsteered images of the same run.</p>",
        _table(rows, ours),
    ]
    for figure in figures:
        picture = base64.b64encode(figure.png).decode()
        kind = " class=plot" if figure.plot else ""
        parts.append(f"<h2>{html.escape(figure.title)}</h2><p>{html.escape(figure.text)}</p>")
        parts.append(f'<div{kind}><img alt="{html.escape(figure.title)}" src="data:image/png;base64,{picture}"></div>')
    parts.append("<h2>How to read this</h2><ul>" + "".join(f"<li>{html.escape(n)}</li>" for n in notes) + "</ul>")
    return "\n".join(parts) + "</html>\n"
