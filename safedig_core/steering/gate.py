"""The evidence gate: how evidence is read, and how a gate is calibrated to a false-positive rate.

Single tokens are weak witnesses, whole images strong ones. At a witness each token scores
weights . z for a domain, and an image the pool of its tokens' scores, which is then divided by the
witness's norm. Calibration and steering read it through the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..dictionary.dictionary import Dictionary, Gate, Window
from ..evaluation import roc
from ..hosts.host import Host
from ..prompts import PromptPair
from .site import Site, Windows, compile_site

CALIBRATION_SEED = 1_000_000
WITNESS_AUROC = 0.9  # weaker positions only add false alarms to the running maximum
STRONGEST = 1 / 8  # of an image's tokens: what is risky may be small


def evidence_of(site: Site, z: Tensor, position: str) -> Tensor:
    """What each image's tokens, of code z [B, T, R], say of each domain: [B, D]."""
    return pooled(z @ site.evidence.T, position)


def pooled(scores: Tensor, position: str) -> Tensor:
    """The scores of tokens [B, T, D] -> of images [B, D], whatever the number of tokens.

    Image tokens: the mean over the strongest eighth of them, at least one; where an eighth is no whole
    number, the weakest of those counts in part. Prompt tokens: the strongest one, so that neither
    padding nor other words dilute it.
    """
    if not position.endswith("img"):
        return scores.amax(1)
    share = max(1.0, STRONGEST * scores.shape[1])
    count = math.ceil(share)
    strongest = scores.topk(count, dim=1).values
    return (strongest[:, :-1].sum(1) + (share - count + 1) * strongest[:, -1]) / share


class Probe:
    """A tap that changes nothing and keeps, per image, position and domain, the largest evidence."""

    def __init__(self, sites: dict[str, Site], windows: Mapping[str, Window]):
        """`windows[position]` are the noise levels that it reads at."""
        self.positions = tuple(sites)
        self._given, self._windows = sites, windows

    def begin(self, images: int, steps: int, device: torch.device) -> None:
        self._sites = {p: (s.to(device), Windows([self._windows[p]], device)) for p, s in self._given.items()}
        domains = next(iter(self._given.values())).member.shape[0]
        self.evidence = torch.zeros(images, len(self.positions), domains, device=device)
        self.readings = [0] * len(self.positions)

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        self._sigma, self._rows = sigma, rows

    def __call__(self, position: str, a: Tensor) -> Tensor:
        site, window = self._sites[position]
        if window.open(self._sigma):
            at = self.positions.index(position)
            seen = evidence_of(site, site.code(a[self._rows].float()), position)
            seen = torch.where(window.hold(self._sigma), seen, 0.0)
            self.evidence[:, at] = torch.maximum(self.evidence[:, at], seen)
            self.readings[at] += 1
        return a


def probe(
    host: Host,
    dictionary: Dictionary,
    domains: Sequence[str],
    windows: Mapping[str, Window],
    prompts: Sequence[str],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The largest evidence of each domain, without norms, [images, positions, domains].

    Raises ValueError where no step is in a position's window, or what is read there is not finite.
    """
    bare = dictionary.without_gates()
    sites = {p: compile_site(bare, p, domains, ()) for p in windows}
    tap, found = Probe(sites, windows), []
    for start in range(0, len(prompts), host.batch):
        part = prompts[start : start + host.batch]
        host.sample(part, [seed + start + i for i in range(len(part))], tap)
        found.append(tap.evidence.cpu())
        for at, position in enumerate(tap.positions):
            if tap.readings[at] == 0:
                first, last = windows[position]
                raise ValueError(
                    f"{position} can't be read: none of {host.name}'s {host.steps} steps is at a noise level "
                    f"from {first:g} to {last:g}. Choose a wider window."
                )
            if not found[-1][:, at].isfinite().all():
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
    """A gate for a domain, from prompts and noise that nothing was trained on: the safe sides of all
    `pairs` against the domain's unsafe ones. `progress` counts images.

    It reads where the dictionary's plan acts for the domain and the domain has features, in the windows
    of those actions. Raises ValueError where that is nowhere, for pairs with no unsafe prompt of the
    domain, and as `probe` does.
    """
    windows: dict[str, Window] = {}
    features = dictionary.card.domains[domain].features
    for action in dictionary.card.plan:
        if action.domain in ("", domain) and features.get(action.position):
            first, last = windows.get(action.position, action.window)
            windows[action.position] = max(first, action.window[0]), min(last, action.window[1])
    safe = [pair.safe for pair in pairs]
    unsafe = [pair.unsafe for pair in pairs if pair.domain == domain and pair.unsafe is not None]
    if not windows:
        raise ValueError(f"{dictionary.path}: its plan has no action where '{domain}' has features")
    if not unsafe:
        raise ValueError(f"the prompts for calibration have no unsafe one of '{domain}'")
    seen = probe(host, dictionary, [domain], windows, safe + unsafe, CALIBRATION_SEED, progress)[:, :, 0]
    return calibrated_gate(windows, seen[: len(safe)], seen[len(safe) :], false_positive_rate)


def calibrated_gate(
    windows: Mapping[str, Window], safe: Tensor, unsafe: Tensor, false_positive_rate: float
) -> Gate:
    """The gate of one domain from the largest evidence of safe [N, P] and unsafe images [M, P] at each
    of the P positions in `windows`, without norms.

    A position bears witness where it separates the two (AUROC over WITNESS_AUROC; the best one
    always does); its norm is the (1 - false_positive_rate) quantile over safe images. The
    threshold on the maximum over witnesses is the same quantile, raised halfway (in the logarithm)
    to the unsafe images' 5 % quantile where that lies higher: the widest margin both ways.
    """
    positions = list(windows)
    area = [roc(unsafe[:, p].tolist(), safe[:, p].tolist())["auroc"] for p in range(len(positions))]
    witnesses = [p for p, a in enumerate(area) if a >= WITNESS_AUROC] or [area.index(max(area))]
    ceiling = safe.quantile(1 - false_positive_rate, dim=0)
    floor = unsafe.amax(0).clamp(min=1e-6) * 1e-3  # a position that never fires on safe images
    norms = torch.maximum(ceiling, floor)
    quiet, loud = ((side / norms)[:, witnesses].amax(1) for side in (safe, unsafe))
    limit = quiet.quantile(1 - false_positive_rate).clamp(min=1e-3)
    threshold = torch.maximum(limit, (limit * loud.quantile(0.05)).clamp(min=0).sqrt()).item()
    rate = (quiet > threshold).float().mean().item()
    chosen = [(positions[p], norms[p].item()) for p in witnesses]
    return Gate(dict(chosen), {p: windows[p] for p, _ in chosen}, threshold, rate, len(safe))
