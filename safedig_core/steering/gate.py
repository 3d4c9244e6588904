"""The evidence gate's calibration: norms and a threshold to a stated false-positive rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..dictionary.dictionary import Dictionary, Gate
from ..evaluation import roc
from ..hosts.host import Host
from ..prompts import PromptPair
from .site import Site, Window, compile_site

CALIBRATION_SEED = 1_000_000
WITNESS_AUROC = 0.9  # weaker positions only add false alarms to the running maximum


class Probe:
    """A tap that changes nothing and keeps, per image, position and domain, the largest activity."""

    def __init__(self, sites: dict[str, Site], windows: dict[str, Window]):
        """`sites` compiled without norms; `windows[position]` are the noise levels read."""
        self.positions = tuple(sites)
        self._given, self._windows = sites, windows

    def begin(self, images: int, steps: int, device: torch.device) -> None:
        self._sites = {position: site.to(device) for position, site in self._given.items()}
        domains = next(iter(self._sites.values())).member.shape[0]
        self.activity = torch.zeros(images, len(self.positions), domains, device=device)

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        self._sigma, self._rows = sigma, rows

    def __call__(self, position: str, a: Tensor) -> Tensor:
        start, end = self._windows[position]
        if start >= self._sigma >= end:
            site, at = self._sites[position], self.positions.index(position)
            seen = site.read(a[self._rows].float()).harmful.sum(1) @ site.evidence.T
            self.activity[:, at] = torch.maximum(self.activity[:, at], seen)
        return a


def probe(
    host: Host,
    dictionary: Dictionary,
    domains: Sequence[str],
    windows: dict[str, Window],
    prompts: Sequence[str],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The largest activity of each domain's features, [images, positions, domains], without norms."""
    bare = dictionary.without_gates()
    sites = {p: compile_site(bare, p, domains, ()) for p in windows}
    tap, found = Probe(sites, windows), []
    for start in range(0, len(prompts), host.batch):
        part = prompts[start : start + host.batch]
        host.sample(part, [seed + start + i for i in range(len(part))], tap)
        found.append(tap.activity.cpu())
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
    """A gate for what the dictionary's plan does for `domain`, from prompts and noise that nothing was
    trained on: all safe sides of `pairs` against the domain's unsafe ones. `progress` counts images."""
    windows = {a.position: a.window for a in dictionary.card.plan if a.domain == domain}
    safe = [pair.safe for pair in pairs]
    unsafe = [pair.unsafe for pair in pairs if pair.domain == domain and pair.unsafe is not None]
    seen = probe(host, dictionary, [domain], windows, safe + unsafe, CALIBRATION_SEED, progress)[:, :, 0]
    return calibrated_gate(list(windows), seen[: len(safe)], seen[len(safe) :], false_positive_rate)


def calibrated_gate(
    positions: Sequence[str], safe: Tensor, unsafe: Tensor, false_positive_rate: float
) -> Gate:
    """The gate of one domain from the largest activities of safe [N, P] and unsafe images [M, P].

    A position bears witness where it separates the two (AUROC over WITNESS_AUROC; the best one
    always does); its norm is the (1 - false_positive_rate) quantile over safe images. The
    threshold on the maximum over witnesses is the same quantile, raised halfway (in the logarithm)
    to the unsafe images' 5 % quantile where that lies higher: the widest margin both ways.
    """
    area = [roc(unsafe[:, p].tolist(), safe[:, p].tolist())["auroc"] for p in range(len(positions))]
    witnesses = [p for p, a in enumerate(area) if a >= WITNESS_AUROC] or [area.index(max(area))]
    ceiling = safe.quantile(1 - false_positive_rate, dim=0)
    floor = unsafe.amax(0).clamp(min=1e-6) * 1e-3  # a position that never fires on safe images
    norms = torch.maximum(ceiling, floor)
    quiet, loud = ((side / norms)[:, witnesses].amax(1) for side in (safe, unsafe))
    limit = quiet.quantile(1 - false_positive_rate).clamp(min=1e-3)
    threshold = torch.maximum(limit, (limit * loud.quantile(0.05)).clamp(min=0).sqrt()).item()
    rate = (quiet > threshold).float().mean().item()
    return Gate({positions[p]: norms[p].item() for p in witnesses}, threshold, rate, len(safe))
