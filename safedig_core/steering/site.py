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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..dictionary.dictionary import Action, Dictionary, DictionaryError, Window
from ..sae import SAE


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
    adapted: dict[int, Tensor]  # domain -> [B, T, A], E(a) of the rows that its adapter moves


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
    delta: dict[int, Tensor]  # domain -> [R, d], times s
    whole: SAE | None  # for paper Blend only, as is
    adapted: dict[int, tuple[Tensor, Tensor]]  # domain -> rows [A] of the whole that moved, [A, d] times s
    actions: tuple[Action, ...]
    witness: tuple[Window | None, ...]  # by domain: where it bears witness; None where it doesn't

    def map(self, change: Callable[[Tensor], Tensor]) -> Site:
        """The site with `change(t)` in the place of each of its tensors."""

        def of(owner: Site | SAE) -> dict[str, Tensor]:
            values = {f.name: getattr(owner, f.name) for f in fields(owner)}
            return {name: change(t) for name, t in values.items() if isinstance(t, Tensor)}

        return replace(
            self,
            **of(self),
            delta={d: change(t) for d, t in self.delta.items()},
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
        adapted = {d: z[..., rows] for d, (rows, _) in self.adapted.items()}
        return Reconstruction(self.whole.decode(z) - a, adapted)

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
                for domain, rows in self.delta.items():
                    total += (z * strength[:, None, None, domain]) @ rows
            else:
                assert whole is not None
                total += strength.sum(1)[:, None, None] * whole.error
                for domain, (_, rows) in self.adapted.items():
                    total += (whole.adapted[domain] * strength[:, None, None, domain]) @ rows
            if action.form == "residual":
                touched |= (weighted > 0).any(-1)
            else:
                touched |= (on > 0)[..., 0]
        return total, touched


def compile_site(
    dictionary: Dictionary, position: str, domains: Sequence[str], actions: Sequence[Action]
) -> Site:
    """The site of one position for `domains`, in the order given. Raises DictionaryError where the
    dictionary lacks the position, or has numbers there that float32 can't hold together."""
    index, rows = dictionary.needed(position, list(domains))
    column = {feature: i for i, feature in enumerate(index)}
    member = torch.zeros(len(domains), len(index))
    evidence, quiet = torch.zeros(len(domains), len(index)), torch.zeros(len(domains))
    delta: dict[int, Tensor] = {}
    adapted: dict[int, tuple[Tensor, Tensor]] = {}
    needs_whole = any(a.form == "paper" and a.operator == "blend" for a in actions)
    for d, name in enumerate(domains):
        domain = dictionary.card.domains[name]
        mine = domain.features.get(position, [])
        columns = [column[f] for f in mine]
        member[d, columns] = 1.0
        told = domain.gate.witnesses.get(position) if domain.gate else None
        if told is not None:
            evidence[d, [column[f] for f in told.features]] = torch.tensor(told.weights) / told.scale
            quiet[d] = torch.tensor(told.offset / told.scale)  # infinite where float32 can't hold it
        adapter = dictionary.delta(position, name)
        if adapter is not None:
            moved, change = adapter
            own = [i for i, f in enumerate(moved.tolist()) if f in mine]  # z_M: no other feature acts
            if own:
                delta[d] = torch.zeros(len(index), rows.width)
                delta[d][[column[f] for f in moved[own].tolist()]] = change[own] * rows.scale
            if needs_whole:
                adapted[d] = (moved, change * rows.scale)
    gates = [dictionary.card.domains[name].gate for name in domains]
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
        adapted=adapted,
        actions=tuple(actions),
        witness=tuple(told and told.window for told in (g and g.witnesses.get(position) for g in gates)),
    )
    folded = [site.weight, site.bias, site.decoder, site.offset, evidence, quiet, *delta.values()]
    mute = any(window and not evidence[d].any() for d, window in enumerate(site.witness))
    if mute or not all(bool(t.isfinite().all()) for t in folded):
        raise DictionaryError(
            f"{dictionary.path}: its scale, weights and witness at {position} are too far apart for float32. "
            "Make it again, or get it again from its source."
        )
    return site
