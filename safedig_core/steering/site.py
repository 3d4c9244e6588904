"""One position's part of a plan: its tensors, and the operators.

With z the code of the harmful features M of one activation a, s the scale of its position:

    residual Repel  a' = a - g s W_s^T z_M           residual Blend  a' = a + b s dW^T z_M
    paper Repel     a' = a - g (D(z_M) - a)          paper Blend     a' = (1 - b) a + b D_t(E(a))

Eq. 16-18 for the paper's; the residual forms keep the SAE's error term and move only tokens in
which a harmful feature fires. Every operator is computed as a change to a, so that several on
one position add up, and a token or image that is not acted on stays bit-identical.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..dictionary.dictionary import Action, Dictionary, DictionaryError, Window, Witness
from ..sae import SAE

# What no honest dictionary comes near. The usual length of an activation is sqrt(d) in units of the scale.
MOST_ACTING = 1 << 14  # features that act or tell at one position, of all domains
MOST_GAIN = 1e3  # how far one feature moves an activation, in usual lengths
MOST_EVIDENCE = 1e6  # that one feature gives, or an offset takes
MOST = 1e6  # of a scale and of 1 over it, and of means and biases in units of it
FARTHEST = 1e3  # usual lengths that an activation may have: a gate that even that doesn't open never opens


class Windows:
    """Noise levels from a start down to an end, N of them; None holds none."""

    def __init__(self, windows: Sequence[Window | None], device: torch.device):
        self._pairs = [(-1.0, 2.0) if w is None else (_single(w[0]), _single(w[1])) for w in windows]
        self._levels = torch.tensor(self._pairs, device=device).reshape(-1, 2)

    def open(self, sigma: float | Tensor) -> bool:
        """Whether any may hold sigma. True only where one does, if that is a number; a tensor isn't read."""
        if isinstance(sigma, Tensor):
            return any(start >= end for start, end in self._pairs)
        return any(start >= _single(sigma) >= end for start, end in self._pairs)

    def hold(self, sigma: float | Tensor) -> Tensor:
        """[N], which of them hold sigma."""
        level = sigma if isinstance(sigma, Tensor) else _single(sigma)
        return (self._levels[:, 0] >= level) & (self._levels[:, 1] <= level)


def _single(level: float) -> float:
    """As float32 has it: a device may have no other, and a window must hold the same levels everywhere."""
    return ctypes.c_float(level).value


@dataclass(frozen=True)
class Reconstruction:
    """What paper Blend needs of activations a [B, T, d], from one pass through the whole SAE."""

    error: Tensor  # [B, T, d], D(E(a)) - a
    code: Tensor  # [B, T, U], E(a) of the features that any adapter moves


@dataclass(frozen=True)
class Site:
    """What one position needs: the rows of its harmful features, folded for one matrix product.

    R features (the union over D domains); h = a weight^T + bias is the SAE's pre-activation.
    """

    weight: Tensor  # [R, d]
    bias: Tensor  # [R]
    threshold: Tensor  # [R]
    decoder: Tensor  # [R, d], times s
    offset: Tensor  # [d], D(0)
    member: Tensor  # [D, R], 1 where the feature is one of the domain's
    evidence: Tensor  # [D, R], the witness's weights over its scale; 0 where the gate has no witness
    quiet: Tensor  # [D], its offset over its scale
    delta: dict[int, tuple[Tensor, Tensor]]  # domain -> which [A] of the R it moves, [A, d] times s
    whole: SAE | None  # for paper Blend only, as is
    moved: Tensor  # [U], features of the whole that any adapter moves
    adapted: dict[int, tuple[Tensor, Tensor]]  # domain -> which [A] of the U it moves, [A, d] times s
    actions: tuple[Action, ...]
    witness: tuple[Window | None, ...]  # by domain: where it bears witness; None where it doesn't
    most: tuple[float, ...]  # by domain: no activation up to FARTHEST gives it more evidence than this

    def map(self, change: Callable[[Tensor], Tensor]) -> Site:
        """The site with `change(t)` in the place of each of its tensors."""

        def of(owner: Site | SAE) -> dict[str, Tensor]:
            values = {f.name: getattr(owner, f.name) for f in fields(owner)}
            return {name: change(t) for name, t in values.items() if isinstance(t, Tensor)}

        return replace(
            self,
            **of(self),
            delta={d: (change(rows), change(t)) for d, (rows, t) in self.delta.items()},
            whole=None if self.whole is None else SAE(**of(self.whole)),
            adapted={d: (change(rows), change(t)) for d, (rows, t) in self.adapted.items()},
        )

    def to(self, device: torch.device | str) -> Site:
        return self.map(lambda t: t.to(device))

    def code(self, a: Tensor) -> Tensor:
        """[B, T, d] -> z_M of all domains [B, T, R]. NaN stays NaN: evidence must not miss it."""
        h = a @ self.weight.T + self.bias
        return torch.where(h <= self.threshold, 0.0, h)

    def reconstruct(self, a: Tensor) -> Reconstruction | None:
        """Of [B, T, d]; None where no action needs it."""
        if self.whole is None:
            return None
        z = self.whole.encode(a)
        return Reconstruction(self.whole.decode(z) - a, z.index_select(-1, self.moved))

    def change(
        self, a: Tensor, z: Tensor, whole: Reconstruction | None, strengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The summed change of all actions [B, T, d], and which tokens it is meant for [B, T].

        `z` and `whole` are those of `a`; `strengths` holds [B, D] per action: zero where an image's
        gate is closed. Where open domains share a feature, Repel takes the larger strength, Blend
        the sum of both changes.
        """
        total = torch.zeros_like(a)
        touched = torch.zeros(a.shape[:2], dtype=torch.bool, device=a.device)
        for action, strength in zip(self.actions, strengths, strict=True):
            on = strength.amax(1)[:, None, None]  # [B, 1, 1]
            coefficient = (strength[:, :, None] * self.member).amax(1)[:, None]  # [B, 1, R]
            weighted = z * coefficient
            if action.operator == "repel" and action.form == "residual":
                total -= weighted @ self.decoder
            elif action.operator == "repel":
                total -= weighted @ self.decoder + on * (self.offset - a)
            elif action.form == "residual":
                for domain, (which, rows) in self.delta.items():
                    total += (z.index_select(-1, which) * strength[:, None, None, domain]) @ rows
            else:
                assert whole is not None
                total += strength.sum(1)[:, None, None] * whole.error
                for domain, (which, rows) in self.adapted.items():
                    total += (whole.code.index_select(-1, which) * strength[:, None, None, domain]) @ rows
            if action.form == "residual":
                touched |= (weighted > 0).any(-1)
            else:
                touched |= (on > 0)[..., 0]
        return total, touched


def compile_site(
    dictionary: Dictionary, position: str, domains: Sequence[str], actions: Sequence[Action]
) -> Site:
    """The site of one position for `domains`, in the order given. Raises DictionaryError where the
    dictionary lacks the position, or has numbers or windows there that no honest one has."""
    index, rows = dictionary.needed(position, list(domains))
    if len(index) > MOST_ACTING:
        raise DictionaryError(
            f"{dictionary.path}: {len(index)} features act or tell at {position}, more than {MOST_ACTING}. "
            "Choose fewer adapters, or make it again with fewer features."
        )
    column = {feature: i for i, feature in enumerate(index)}
    member = torch.zeros(len(domains), len(index))
    evidence, quiet = torch.zeros(len(domains), len(index)), torch.zeros(len(domains))
    delta: dict[int, tuple[Tensor, Tensor]] = {}
    adapters: dict[int, tuple[Tensor, Tensor]] = {}
    needs_whole = any(a.form == "paper" and a.operator == "blend" for a in actions)
    told: list[Witness | None] = []
    for d, name in enumerate(domains):
        domain = dictionary.card.domains[name]
        mine = {*domain.features.get(position, ())}
        member[d, [column[f] for f in mine]] = 1.0
        told.append(domain.gate.witnesses.get(position) if domain.gate else None)
        witness = told[d]
        if witness is not None:
            weights = torch.tensor(witness.weights) / witness.scale
            evidence[d, [column[f] for f in witness.features]] = weights
            quiet[d] = torch.tensor(witness.offset / witness.scale)  # infinite where float32 can't hold it
        adapter = dictionary.delta(position, name)
        if adapter is not None:
            moved, change = adapter
            own = [i for i, f in enumerate(moved.tolist()) if f in mine]  # z_M: no other feature acts
            if own:
                which = torch.tensor([column[f] for f in moved[own].tolist()])
                delta[d] = which, change[own] * rows.scale
            if needs_whole:
                adapters[d] = moved, change * rows.scale
    moved = torch.cat([torch.zeros(0, dtype=torch.long), *(m for m, _ in adapters.values())]).unique()
    site = Site(
        weight=rows.encoder_weight / rows.scale,
        bias=rows.encoder_bias - rows.encoder_weight @ (rows.mean / rows.scale),
        threshold=rows.threshold,
        decoder=rows.decoder_weight * rows.scale,
        offset=rows.decoder_bias * rows.scale + rows.mean,
        member=member,
        evidence=evidence,
        quiet=quiet,
        delta=delta,
        whole=dictionary.sae(position) if needs_whole else None,
        moved=moved,
        adapted={d: (torch.searchsorted(moved, m), change) for d, (m, change) in adapters.items()},
        actions=tuple(actions),
        witness=tuple(w and w.window for w in told),
        most=_most(rows, evidence, quiet),
    )
    for d, fault in _faults(site, rows):
        path = dictionary.path if d is None else dictionary.adapter_paths.get(domains[d], dictionary.path)
        whose = "" if d is None else f", of domain '{domains[d]}'"
        raise DictionaryError(
            f"{path}: at {position}{whose}, {fault}. Make it again, or get it again from its source."
        )
    return site


def _most(rows: SAE, evidence: Tensor, quiet: Tensor) -> tuple[float, ...]:
    """By domain, the evidence that no activation of FARTHEST usual lengths exceeds."""
    farthest = rows.encoder_weight.norm(dim=1) * FARTHEST * math.sqrt(rows.width) + rows.encoder_bias
    code = torch.where(farthest > rows.threshold, farthest, 0.0)
    return tuple((evidence.clamp(min=0) @ code - quiet).clamp(min=0).tolist())


def _faults(site: Site, rows: SAE) -> Iterator[tuple[int | None, str]]:
    """What is wrong with the site of the SAE `rows`, in words, and with which domain; None for all.

    Beyond these bounds pictures lose their numbers, and evidence is always enough or never.
    """
    folded = [site.weight, site.bias, site.decoder, site.offset, site.evidence, site.quiet]
    folded += [change for _, change in site.delta.values()]
    mute = any(window and not site.evidence[d].any() for d, window in enumerate(site.witness))
    if mute or not all(bool(t.isfinite().all()) for t in folded):
        yield None, "its scale, weights and witness are too far apart for float32"
    units = torch.cat([torch.stack([rows.scale, 1 / rows.scale]), rows.mean / rows.scale, rows.decoder_bias])
    if not _under(units, MOST):
        yield None, "its scale, mean or decoder's bias is beyond any activation's"
    windows = [*enumerate(site.witness), *((None, action.window) for action in site.actions)]
    for d, window in windows:
        if window is not None and window[0] == window[1] < 1:
            yield d, f"a window holds the noise level {window[0]:g} alone, which no sampler meets"
    code = _code(rows)
    for d, weights in enumerate(site.evidence):
        if not (_under(weights * code, MOST_EVIDENCE) and _under(site.quiet[d], MOST_EVIDENCE)):
            yield d, f"what its witness makes of a feature, or its offset, is over {MOST_EVIDENCE:g}"
    gains = code * rows.decoder_weight.norm(dim=1)
    found: list[tuple[int | None, Tensor]] = [(d, gains[on]) for d, on in enumerate(site.member > 0)]
    found += [(d, code[which] * _lengths(change, rows)) for d, (which, change) in site.delta.items()]
    if site.whole is not None:
        code = _code(site.whole)
        found.append((None, code * site.whole.decoder_weight.norm(dim=1)))
        code = code[site.moved]
        found += [(d, code[which] * _lengths(change, rows)) for d, (which, change) in site.adapted.items()]
    for d, gain in found:
        if not _under(gain, MOST_GAIN * math.sqrt(rows.width)):
            yield d, f"a feature moves activations by more than {MOST_GAIN:g} times their usual length"


def _code(sae: SAE) -> Tensor:
    """[F], the most that each feature says of an activation of usual length."""
    return sae.encoder_weight.norm(dim=1) * math.sqrt(sae.width) + sae.encoder_bias.abs()


def _lengths(change: Tensor, sae: SAE) -> Tensor:
    return change.norm(dim=1) / sae.scale


def _under(values: Tensor, most: float) -> bool:
    return bool((values.abs() <= most).all())  # what is no number isn't
