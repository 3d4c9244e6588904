"""The evidence gate: how evidence is read, and how a gate is calibrated to a false-positive rate.

Single tokens are weak witnesses, whole images strong ones. At a witness each token scores weights . z for a
domain, and an image the pool of its tokens' scores. What that says is evidence as far as it is over the
witness's offset, in units of its scale; the evidence of all witnesses adds up. Calibration and steering
read it through the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..dictionary.dictionary import Dictionary, Gate, Witness
from ..hosts.host import Host
from ..prompts import PromptPair
from ..seeds import CALIBRATION
from .site import Site, Windows, compile_site

LENIENCE = 3  # times the false-positive rate that any single form of safe prompts may reach
LEAST_SCALE = 1e-3  # of a witness, of the largest score: where safe images are all alike
NEAR = "near-"  # begins the forms of safe prompts that resemble a risk
NEAR_LENIENCE = 10  # the same of those forms


def scores_of(site: Site, z: Tensor, position: str) -> Tensor:
    """What each image's tokens, of code z [B, T, R], say of each domain, in units of the witness's scale:
    [B, D]. One token whose score is infinite makes it NaN: of either sign, it must not be missed."""
    scores = z @ site.evidence.T
    return pooled(torch.where(scores.isfinite(), scores, torch.nan), position)


def evidence_of(site: Site, z: Tensor, position: str) -> Tensor:
    """What of that is over the witness's offset, [B, D], 0 or more. NaN stays NaN."""
    return (scores_of(site, z, position) - site.quiet).clamp(min=0)


def pooled(scores: Tensor, position: str) -> Tensor:
    """The scores of tokens [B, T, D] -> of images [B, D], whatever the number of tokens.

    Image tokens: their mean. Prompt tokens: the strongest one, so that neither padding nor other words
    dilute it.
    """
    return scores.mean(1) if position.endswith("img") else scores.amax(1)


class Probe:
    """A tap that changes nothing and keeps, per image, position and domain, the largest score."""

    def __init__(self, sites: Mapping[str, Site]):
        self.positions = tuple(sites)
        self._given = sites

    def begin(self, images: int, steps: int, device: torch.device) -> None:
        self._sites = {p: (s.to(device), Windows(s.witness, device)) for p, s in self._given.items()}
        domains = next(iter(self._given.values())).member.shape[0]
        self.scores = torch.full((images, len(self.positions), domains), -math.inf, device=device)
        self.readings = [0] * len(self.positions)

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        self._sigma, self._rows = sigma, rows

    def __call__(self, position: str, a: Tensor) -> Tensor:
        site, windows = self._sites[position]
        if windows.open(self._sigma):
            at = self.positions.index(position)
            seen = scores_of(site, site.code(a[self._rows].float()), position)
            seen = torch.where(windows.hold(self._sigma), seen, -math.inf)
            self.scores[:, at] = torch.maximum(self.scores[:, at], seen)
            self.readings[at] += 1
        return a


def probe(
    host: Host,
    dictionary: Dictionary,
    domains: Sequence[str],
    prompts: Sequence[str],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The largest score of each domain at each of its witnesses in units of its scale,
    [images, positions, domains], in the order of a forward pass; -inf where a domain has no witness.

    Raises ValueError where no step is in a witness's window, or what is read there is not finite.
    """
    gates = [dictionary.card.domains[name].gate for name in domains]
    places = {position for gate in gates if gate for position in gate.witnesses}
    order = [position for position in host.architecture.positions() if position in places]
    sites = {position: compile_site(dictionary, position, domains, ()) for position in order}
    tap, found = Probe(sites), []
    for start in range(0, len(prompts), host.batch):
        part = prompts[start : start + host.batch]
        host.sample(part, [seed + start + i for i in range(len(part))], tap)
        found.append(tap.scores.cpu())
        for at, position in enumerate(tap.positions):
            if tap.readings[at] == 0:
                raise ValueError(
                    f"{position} can't be read: none of {host.name}'s {host.steps} steps is in its window. "
                    "Choose a wider window."
                )
            read = [d for d, window in enumerate(sites[position].witness) if window is not None]
            if not found[-1][:, at, read].isfinite().all():
                raise ValueError(f"what {host.name} computes at {position} is not finite")
        if progress is not None:
            progress(start + len(part), len(prompts))
    return torch.cat(found)


def calibrate(
    host: Host,
    dictionary: Dictionary,
    domain: str,
    pairs: Sequence[PromptPair],
    false_positive_rate: float,
    progress: Callable[[int, int], None] | None = None,
) -> Gate:
    """The domain's gate, its witnesses weighed and its threshold set on prompts and noise that nothing was
    trained on: the safe sides of all `pairs` against the domain's unsafe ones. `progress` counts images.

    Raises ValueError for a domain without witnesses, for pairs with no unsafe prompt of the domain, and as
    `probe` does.
    """
    gate = dictionary.card.domains[domain].gate
    if gate is None:
        raise ValueError(f"{dictionary.path}: nothing was learned that could tell '{domain}'")
    safe = [(pair.safe, pair.form or "other") for pair in pairs]
    unsafe = [pair.unsafe for pair in pairs if pair.domain == domain and pair.unsafe is not None]
    if not unsafe:
        raise ValueError(f"the prompts for calibration have no unsafe one of '{domain}'")
    bare = {p: replace(w, offset=0.0, scale=1.0) for p, w in gate.witnesses.items()}
    domains = dictionary.card.domains | {domain: replace(dictionary.card.domains[domain])}
    domains[domain].gate = replace(gate, witnesses=bare)
    prompts = [text for text, _ in safe] + unsafe
    seen = probe(host, dictionary.with_domains(domains), [domain], prompts, CALIBRATION, progress)[:, :, 0]
    order = [position for position in host.architecture.positions() if position in bare]
    witnesses = {position: bare[position] for position in order}
    forms = [form for _, form in safe]
    return calibrated_gate(witnesses, seen[: len(safe)], forms, seen[len(safe) :], false_positive_rate)


def calibrated_gate(
    witnesses: Mapping[str, Witness],
    safe: Tensor,
    forms: Sequence[str],
    unsafe: Tensor,
    false_positive_rate: float,
) -> Gate:
    """The gate of one domain from the largest scores of safe images [N, P], with the `forms` of their
    prompts, and of unsafe ones [M, P], at each of the P witnesses.

    A witness's offset is the safe images' median, and its scale what lies between that and their
    (1 - false_positive_rate) quantile, so that each counts the same; but those at image tokens, which all
    see the same picture, together count as one. (Weights learned from these prompts go to `text`, which
    knows their words, and leave out the image tokens, which also know what they see under another name.)

    The threshold is the highest of: the (1 - false_positive_rate) quantile over all safe images, and for each
    form the quantile at LENIENCE times that rate, or NEAR_LENIENCE times where it resembles a risk; where
    unsafe images leave room (their 5 % quantile lies higher still), it is raised by a quarter of the way.
    """
    offset = safe.median(0).values
    reach = torch.cat([safe, unsafe]).amax(0) - offset
    scale = torch.maximum(safe.quantile(1 - false_positive_rate, dim=0) - offset, LEAST_SCALE * reach)
    scale = torch.where(scale > 0, scale, 1.0)  # nothing was ever seen there
    at_image = torch.tensor([position.endswith("img") for position in witnesses])
    scale = torch.where(at_image, at_image.sum() * scale, scale)
    quiet, loud = (((side - offset) / scale).clamp(min=0).sum(1) for side in (safe, unsafe))
    limits = [quiet.quantile(1 - false_positive_rate)]
    for form in sorted(set(forms)):
        lenience = NEAR_LENIENCE if form.startswith(NEAR) else LENIENCE
        mine = quiet[[f == form for f in forms]]
        limits.append(mine.quantile(max(0.5, 1 - lenience * false_positive_rate)))
    limit = torch.stack(limits).amax()
    threshold = (limit + 0.25 * (loud.quantile(0.05) - limit).clamp(min=0)).clamp(min=1e-3).item()
    opened = (quiet > threshold).tolist()
    by_form = {
        form: [o for o, f in zip(opened, forms, strict=True) if f == form] for form in sorted(set(forms))
    }
    return Gate(
        {
            position: replace(witness, offset=offset[p].item(), scale=scale[p].item())
            for p, (position, witness) in enumerate(witnesses.items())
        },
        threshold,
        sum(opened) / len(opened),
        len(opened),
        {form: (sum(mine), len(mine)) for form, mine in by_form.items()},
    )
