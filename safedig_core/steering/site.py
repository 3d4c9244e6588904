"""One position's part of a plan: its tensors, and the operators.

With z the code of the harmful features M of one activation a, s the scale of its position:

    residual Repel  a' = a - g s W_s^T z_M           residual Blend  a' = a + b s dW^T z_M
    paper Repel     a' = a - g (D(z_M) - a)          paper Blend     a' = (1 - b) a + b D_t(E(a))

Eq. 16-18 for the paper's; the residual forms keep the SAE's error term and move only tokens in
which a harmful feature fires. Every operator is computed as a change to a, so that several on
one position add up, and a token or image that is not acted on stays bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..dictionary.dictionary import Action, Dictionary
from ..sae import SAE

Window = tuple[float, float]  # noise levels, from the first down to the last


@dataclass(frozen=True)
class Code:
    """What a site reads in activations [B, T, d]."""

    harmful: Tensor  # [B, T, R]: z_M of all domains
    error: Tensor | None = None  # [B, T, d]: D(E(a)) - a; for paper Blend only, as is
    adapted: dict[int, Tensor] | None = None  # domain -> [B, T, A]: E(a) of the rows that its adapter moves


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
    evidence: Tensor  # [D, R], weight over norm; 0 where the domain has no witness here
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

    def read(self, a: Tensor) -> Code:
        """Activations [B, T, d] -> their code. What is not a number stays so, and fires."""
        h = a @ self.weight.T + self.bias
        harmful = torch.where(h <= self.threshold, 0.0, h)
        if self.whole is None:
            return Code(harmful)
        z = self.whole.encode(a)
        moved = {d: z[..., rows] for d, (rows, _) in self.adapted.items()}
        return Code(harmful, self.whole.decode(z) - a, moved)

    def change(self, a: Tensor, code: Code, strengths: Tensor) -> tuple[Tensor, Tensor]:
        """The summed change of all actions [B, T, d], and which tokens it is meant for [B, T].

        `strengths` holds [B, D] per action: zero where an image's gate is closed. Where open
        domains share a feature, Repel takes the larger strength, Blend the sum of both changes.
        """
        z = code.harmful
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
                assert code.error is not None and code.adapted is not None
                total += strength.sum(1)[:, None, None] * code.error
                for domain, (_, rows) in self.adapted.items():
                    total += (code.adapted[domain] * strength[:, None, None, domain]) @ rows
            if action.form == "residual":
                touched |= (weighted > 0).any(-1)
            else:
                touched |= (on > 0)[..., 0]
        return total, touched


def compile_site(
    dictionary: Dictionary, position: str, domains: Sequence[str], actions: Sequence[Action]
) -> Site:
    """The site of one position for `domains`, in the order given."""
    index, rows = dictionary.harmful(position, list(domains))
    column = {feature: i for i, feature in enumerate(index)}
    member = torch.zeros(len(domains), len(index))
    evidence = torch.zeros(len(domains), len(index))
    delta: dict[int, Tensor] = {}
    adapted: dict[int, tuple[Tensor, Tensor]] = {}
    witness: list[Window | None] = []
    needs_whole = any(a.form == "paper" and a.operator == "blend" for a in actions)
    for d, name in enumerate(domains):
        domain = dictionary.card.domains[name]
        mine = domain.features.get(position, [])
        columns = [column[f] for f in mine]
        member[d, columns] = 1.0
        norm = 1.0 if domain.gate is None else domain.gate.norms.get(position, float("inf"))
        evidence[d, columns] = torch.tensor(domain.weights.get(position, [])) / norm
        seen = domain.gate is not None and position in domain.gate.norms and len(actions) > 0
        starts, ends = zip(*(a.window for a in actions), strict=True) if seen else ((), ())
        witness.append((max(starts), min(ends)) if seen else None)
        adapter = dictionary.delta(position, name)
        if adapter is not None:
            moved, change = adapter
            delta[d] = torch.zeros(len(index), rows.width)
            own = [i for i, f in enumerate(moved.tolist()) if f in mine]  # z_M: no other feature acts
            delta[d][[column[f] for f in moved[own].tolist()]] = change[own] * rows.scale
            if needs_whole:
                adapted[d] = (moved, change * rows.scale)
    return Site(
        weight=rows.encoder_weight / rows.scale,
        bias=rows.encoder_bias - rows.encoder_weight @ (rows.mean / rows.scale),
        threshold=rows.threshold,
        decoder=rows.decoder_weight * rows.scale,
        offset=rows.decoder_bias * rows.scale + rows.mean,
        member=member,
        evidence=evidence,
        delta=delta,
        whole=dictionary.sae(position) if needs_whole else None,
        adapted=adapted,
        actions=tuple(actions),
        witness=tuple(witness),
    )
