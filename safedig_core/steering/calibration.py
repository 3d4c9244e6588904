"""A gate's threshold on another variant of the model: checkpoint, LoRA, quantisation, size or sampler.

It is measured from safe prompts alone, and kept in one small JSON file per variant beside the dictionary,
`<dictionary>.<digits>.calibration.json`. What the witnesses read stays as it is: only the threshold over
which a domain is found is set anew, and never further than FURTHEST from the dictionary's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..dictionary.dictionary import Dictionary
from ..files import DOMAIN, blame, build, clear_parts, digest, need, parse_object, read_all, replacing
from ..hosts.host import Host
from ..prompts import SAFE, PromptPair, fingerprint
from ..seeds import CALIBRATION
from .steering import Steering

FORMAT = 1
ENDING = ".calibration.json"
MAX_BYTES = 1 << 20
LEAST_PROMPTS = 20
PROMPTS = 100  # that are sampled where nobody says how many: minutes on a GPU
FURTHEST = 2.0  # a threshold lies between the dictionary's own over this and times this

Variant = dict[str, Any]  # what a host is sampled with: see `variant_of`
_FROM_COMFYUI = re.compile(r"\w+ [0-9a-f]{16}")  # a host's name: the family, and all weights' fingerprint


class CalibrationError(ValueError):
    """Says which calibration file, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Threshold:
    """One domain's, of the file with this SHA-256: a dictionary or an adapter. `forms` count how many safe
    prompts of each form opened the gate at it, and of how many."""

    sha256: str
    threshold: float
    forms: dict[str, tuple[int, int]]

    def __post_init__(self) -> None:
        need(self.threshold > 0, "a threshold must be over 0")
        for opened, prompts in self.forms.values():
            need(0 <= opened <= prompts, "forms must say how many of how many prompts opened the gate")

    @property
    def opened(self) -> tuple[int, int]:
        return sum(a for a, _ in self.forms.values()), sum(b for _, b in self.forms.values())


@dataclass(frozen=True)
class Calibration:
    """What was measured on one variant."""

    variant: Variant
    domains: dict[str, Threshold]
    prompts_sha256: str  # their fingerprint

    def __post_init__(self) -> None:
        need(type(self.variant.get("model")) is str, "its variant names no model")
        for name in self.domains:
            need(DOMAIN.fullmatch(name), f"'{name:.64}' is not the name of a domain")

    def __str__(self) -> str:
        parts = []
        for name, found in self.domains.items():
            opened, prompts = found.opened
            parts.append(f"{name} opens over {found.threshold:.3g} ({opened} of {prompts} safe prompts)")
        return "; ".join(parts)


@dataclass(frozen=True)
class InForce:
    """The thresholds of one run that differ from the dictionary's own, by domain, and in words whose they
    are. `fits`: every domain's was measured on what is sampled."""

    thresholds: dict[str, float] = field(default_factory=dict)
    fits: bool = False
    text: str = ""


def variant_of(host: Host) -> Variant:
    """What tells a host from others of the same architecture. Where a sampler node in ComfyUI can do the very
    same, its settings are among that."""
    return {"model": host.name, "checkpoint": host.checkpoint, **host.sampler, **getattr(host, "comfyui", {})}


def other_sampling(variant: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, how a variant is sampled in another way than the variant `now`; empty where it is the same.
    What decides are the settings of a sampler node, "sigmas", "width", "height" (pixels) and "cfg", or all
    that hosts say which no such node can do the same as."""
    if "sigmas" not in variant and "sigmas" not in now:
        names = {*variant, *now} - {"model", "checkpoint"}
        other = sorted(name for name in names if variant.get(name) != now.get(name))
        return f"with another {', '.join(other)}" if other else ""
    if "sigmas" not in variant or "sigmas" not in now:
        where = "in" if "sigmas" in variant else "outside"
        return f"{where} ComfyUI, with other noise levels or text lengths"
    if (size := _size(variant)) != _size(now):
        return f"at {size} pixels, not {_size(now)}"
    if variant["sigmas"] != now["sigmas"]:
        return "with other steps or noise levels"
    return "" if variant.get("cfg") == now["cfg"] else f"with a cfg of {variant.get('cfg')}, not {now['cfg']}"


def other_weights(variant: Mapping[str, Any], model: str, checkpoint: str) -> str:
    """In words, how a variant has other weights than a host of this name and checkpoint; empty where it has
    the same. In ComfyUI a name tells all weights, elsewhere the place that they are from; between the two
    the checkpoint has to do."""
    theirs = str(variant.get("model"))
    alike = bool(_FROM_COMFYUI.fullmatch(theirs)) == bool(_FROM_COMFYUI.fullmatch(model))
    same = theirs == model if alike else variant.get("checkpoint") == checkpoint
    return "" if same else "on another checkpoint, fine-tune, LoRA or quantisation"


def _size(settings: Mapping[str, Any]) -> str:
    return f"{settings.get('width')} x {settings.get('height')}"


def calibrate_on(
    host: Host,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    false_positive_rate: float,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """The thresholds of all domains on this host, from the evidence that steering reads in unsteered pictures
    of the safe sides of `pairs`: the (1 - false_positive_rate) quantile, but not under the dictionary's own
    over FURTHEST, since a few prompts say little about all others. `progress` counts images.

    Raises ValueError for few prompts, for a domain without a gate, where evidence can't be read or is no
    number, and where safe prompts need a threshold over FURTHEST times the dictionary's own.
    """
    gates = {name: domain.gate for name, domain in dictionary.card.domains.items()}
    prompts = {pair.safe: pair.form or "other" for pair in pairs}
    need(
        len(prompts) >= LEAST_PROMPTS,
        f"{len(prompts)} safe prompts say too little: calibrate on at least {LEAST_PROMPTS}",
    )
    for name, gate in gates.items():
        need(gate is not None, f"{dictionary.path}: nothing was learned that could tell '{name}'")
    evidence = _evidence(host, dictionary, list(prompts), progress)
    found: dict[str, Threshold] = {}
    for name, gate in gates.items():
        assert gate is not None
        limit = max(evidence[name].quantile(1 - false_positive_rate).item(), gate.threshold / FURTHEST)
        most = FURTHEST * gate.threshold
        need(
            limit <= most,
            f"{host.name}: safe pictures show evidence {limit:.3g} of '{name}', where {dictionary.path.name} "
            f"opens over {gate.threshold:.3g} and can be set to {most:.3g} at most: it can't tell them from "
            "risky ones. Make a dictionary for this model.",
        )
        forms: dict[str, tuple[int, int]] = {}
        for over, form in zip((evidence[name] > limit).tolist(), prompts.values(), strict=True):
            opened, count = forms.get(form, (0, 0))
            forms[form] = opened + over, count + 1
        found[name] = Threshold(_sha256(dictionary, name), limit, dict(sorted(forms.items())))
    return Calibration(variant_of(host), found, fingerprint(pairs))


def safe_prompts(pairs: Sequence[PromptPair], most: int = PROMPTS) -> list[PromptPair]:
    """The purely safe ones, `most` at most, evenly spread."""
    safe = [pair for pair in pairs if pair.domain == SAFE]
    count = min(most, len(safe))
    return [safe[i * len(safe) // count] for i in range(count)]


def _evidence(
    host: Host,
    dictionary: Dictionary,
    prompts: Sequence[str],
    progress: Callable[[int, int], None] | None,
) -> dict[str, torch.Tensor]:
    """By domain, each unsteered picture's evidence [N], float64."""
    watching = Steering(dictionary, [], modes=dict.fromkeys(dictionary.card.domains, "observe"))
    found: dict[str, list[float]] = {name: [] for name in watching.domains}
    for start in range(0, len(prompts), host.batch):
        part, run = prompts[start : start + host.batch], watching.run()
        host.sample(part, [CALIBRATION + start + i for i in range(len(part))], run)
        for image in run.receipt()["images"]:
            for name, seen in image.items():
                need(
                    seen["looked"],
                    f"'{name}' can't be told on {host.name}: none of its {host.steps} steps is in the window "
                    "of a witness. Take more steps.",
                )
                need(seen["evidence"] is not None, f"what {host.name} computes is not finite")
                found[name].append(seen["evidence"])
        if progress is not None:
            progress(start + len(part), len(prompts))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def save_beside(calibration: Calibration, dictionary: Dictionary) -> Path:
    """Writes it beside the dictionary's file, in the place of an earlier one of the same variant. Raises
    ValueError where that can't be written."""
    name = f"{dictionary.path.stem}.{digest(calibration.variant)[:12]}{ENDING}"
    path = dictionary.path.with_name(name)
    text = json.dumps({"format": FORMAT, **asdict(calibration)}, indent=1, allow_nan=False)
    with blame(CalibrationError, path, "Nothing was written."):
        clear_parts(path.parent, path.name)
        with replacing(path) as part:
            part.write_text(text + "\n", encoding="utf-8")
    return path


def read_calibration(path: Path) -> Calibration:
    """Raises CalibrationError on anything but what `save_beside` writes."""
    with blame(CalibrationError, path, "Delete the file, or calibrate again."):
        value = parse_object(read_all(path, MAX_BYTES).decode(), "the calibration")
        version = value.pop("format", None)
        need(type(version) is int and version == FORMAT, f"its format is {version!r:.20}, not {FORMAT}")
        return build(Calibration, value, "the calibration")


def beside(dictionary: Dictionary) -> list[Calibration]:
    """Those of this dictionary's file, by name. Raises CalibrationError."""
    stem = dictionary.path.stem
    names = sorted(p for p in dictionary.path.parent.iterdir() if p.name.endswith(ENDING))
    return [read_calibration(p) for p in names if p.name[: -len(ENDING)].rpartition(".")[0] == stem]


def in_force(
    dictionary: Dictionary, calibrations: Sequence[Calibration], differs: Callable[[Mapping[str, Any]], str]
) -> InForce:
    """Which thresholds hold for what is sampled; `differs` says, in words, how a variant is something else.
    Of each domain the one that was measured on it, else the dictionary's own. Raises ValueError for one too
    far from that."""
    reasons = [differs(calibration.variant) for calibration in calibrations]
    fitting = [calibration for calibration, reason in zip(calibrations, reasons, strict=True) if not reason]
    thresholds: dict[str, float] = {}
    for name, domain in dictionary.card.domains.items():
        if domain.gate is None:
            continue
        for calibration in fitting:
            found = calibration.domains.get(name)
            if found is None or found.sha256 != _sha256(dictionary, name):
                continue
            own, near = domain.gate.threshold, FURTHEST * (1 + 1e-6)
            need(
                own / near <= found.threshold <= own * near,
                f"{dictionary.path}: a calibration beside it sets the threshold of '{name}' to "
                f"{found.threshold:.3g}, and the dictionary's own is {own:.3g}. Calibrate again.",
            )
            thresholds[name] = found.threshold
    gated = [name for name, domain in dictionary.card.domains.items() if domain.gate is not None]
    if gated and len(thresholds) == len(gated):
        return InForce(thresholds, True, f"measured on this model, size and sampler: {', '.join(thresholds)}")
    own = dictionary.card.training.get("calibrated_on")
    if type(own) is dict:
        reasons.append(differs(own))
        if not thresholds and not reasons[-1]:
            return InForce({}, True, "the dictionary's own, measured on this model, size and sampler")
    left = ", ".join(name for name in gated if name not in thresholds)
    measured = "; ".join(list(dict.fromkeys(filter(None, reasons)))[:3])
    return InForce(
        thresholds,
        False,
        f"none fits this model, size and sampler{f' (measured {measured})' if measured else ''}; the "
        f"dictionary's own hold for {left or 'it'}. Calibrate Gate measures thresholds from safe prompts",
    )


def in_force_on(host: Host, dictionary: Dictionary) -> InForce:
    """What holds on a host outside ComfyUI, of what is beside the dictionary."""
    now = variant_of(host)

    def differs(variant: Mapping[str, Any]) -> str:
        if variant.get("model") == host.name and variant.items() <= now.items():  # older ones say less
            return ""
        return other_sampling(variant, now) or other_weights(variant, host.name, host.checkpoint)

    return in_force(dictionary, beside(dictionary), differs)


def _sha256(dictionary: Dictionary, domain: str) -> str:
    """Of the file that a domain's gate is in."""
    return dictionary.adapter_sha256.get(domain) or dictionary.sha256
