"""Steering: the operators, the evidence gate, and the sites that apply both in a forward pass.

With z the code of the harmful features M of one activation a, s the scale of its position:

    residual Repel  a' = a - g s W_s^T z_M           residual Blend  a' = a + b s dW^T z_M
    paper Repel     a' = a - g (D(z_M) - a)          paper Blend     a' = (1 - b) a + b D_t(E(a))

Eq. 16-18 for the paper's; the residual forms keep the SAE's error term and move only tokens in
which a harmful feature fires. Every operator is computed as a change to a, so that several on
one position add up, and a token or image that is not acted on stays bit-identical.

The evidence gate: per image and domain, the weighted activity of the harmful features, pooled
over the image's tokens and divided by the position's norm, kept as a running maximum over
positions and steps. Sites act on an image for a domain only while that value exceeds the
domain's threshold; being a maximum, an open gate stays open. A domain without a gate is always open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..dictionary.dictionary import Action, Dictionary
from ..sae import SAE

MODES = ("steer", "observe", "stop")
ALWAYS = -1.0  # a limit that any evidence exceeds


class RiskFound(RuntimeError):
    """A domain set to `stop` has opened its gate; `verdict` says where."""


@dataclass
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
    evidence: Tensor  # [D, R], weight over norm
    delta: dict[int, Tensor]  # domain -> [R, d], times s
    transferred: dict[int, SAE]  # domain -> the whole SAE with D_t, for paper Blend only
    actions: tuple[Action, ...]

    def code(self, a: Tensor) -> Tensor:
        """[B, T, d] -> z_M [B, T, R]."""
        h = a @ self.weight.T + self.bias
        return torch.where(h > self.threshold, h, 0.0)

    def change(self, a: Tensor, z: Tensor, strengths: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The summed change of all actions [B, T, d], and which tokens it moves [B, T].

        `strengths` holds [B, D] per action: zero where an image's gate is closed. Where open
        domains share a feature, Repel takes the larger strength, Blend the sum of both changes.
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
                for domain, sae in self.transferred.items():
                    total += strength[:, None, None, domain] * (sae.reconstruct(a) - a)
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
    transferred: dict[int, SAE] = {}
    needs_whole = any(a.form == "paper" and a.operator == "blend" for a in actions)
    whole = dictionary.sae(position) if needs_whole else None
    for d, name in enumerate(domains):
        domain = dictionary.card.domains[name]
        mine = domain.features.get(position, [])
        columns = [column[f] for f in mine]
        member[d, columns] = 1.0
        norm = 1.0 if domain.gate is None else domain.gate.norms.get(position, float("inf"))
        evidence[d, columns] = torch.tensor(domain.weights.get(position, [])) / norm
        adapter = dictionary.delta(position, name)
        if adapter is not None:
            moved, change = adapter
            delta[d] = torch.zeros(len(index), rows.width)
            own = [i for i, f in enumerate(moved.tolist()) if f in mine]  # z_M: no other feature acts
            delta[d][[column[f] for f in moved[own].tolist()]] = change[own] * rows.scale
        if whole is not None:
            decoder = whole.decoder_weight.clone()
            if adapter is not None:
                decoder[adapter[0]] += adapter[1]
            transferred[d] = replace(whole, decoder_weight=decoder)
    return Site(
        weight=rows.encoder_weight / rows.scale,
        bias=rows.encoder_bias - rows.encoder_weight @ (rows.mean / rows.scale),
        threshold=rows.threshold,
        decoder=rows.decoder_weight * rows.scale,
        offset=rows.decoder_bias * rows.scale + rows.mean,
        member=member,
        evidence=evidence,
        delta=delta,
        transferred=transferred,
        actions=tuple(actions),
    )


class Steering:
    """A plan compiled for one dictionary, and the state of one sampling run.

    A host calls `begin` before sampling, `step` before each forward pass, and the object itself
    with every activation of `positions`.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        plan: Sequence[Action] | None = None,
        *,
        modes: dict[str, str] | None = None,
        strength: float = 1.0,
        gate: bool = True,
        preserve_norm: bool = False,
    ):
        """`plan` defaults to the dictionary's; `modes` maps domains to steer (default), observe
        (evidence only) or stop; `strength` multiplies every action's. Raises ValueError for an
        unknown domain, mode or position, and for a residual Blend that no adapter can serve."""
        self.dictionary = dictionary
        self.domains = tuple(dictionary.card.domains)
        self.plan = tuple(dictionary.card.plan if plan is None else plan)
        self.modes = dict.fromkeys(self.domains, "steer") | (modes or {})
        self.strength, self.gate, self.preserve_norm = strength, gate, preserve_norm
        for name, mode in self.modes.items():
            if name not in self.domains:
                raise ValueError(f"no domain '{name}' in {dictionary.path}: it has {', '.join(self.domains)}")
            if mode not in MODES:
                raise ValueError(f"unknown mode '{mode}' for domain '{name}': expected {', '.join(MODES)}")
        by_position: dict[str, list[Action]] = {}
        for action in self.plan:
            dictionary.card.architecture.require(action.position)
            if action.domain and action.domain not in self.domains:
                raise ValueError(f"the plan names domain '{action.domain}', which {dictionary.path} lacks")
            by_position.setdefault(action.position, []).append(action)
        order = [p for p in dictionary.card.architecture.positions() if p in by_position]
        self.sites = {p: compile_site(dictionary, p, self.domains, by_position[p]) for p in order}
        for position, site in self.sites.items():
            for action in site.actions:
                if (action.operator, action.form) == ("blend", "residual") and not site.delta:
                    raise ValueError(f"{dictionary.path} has no adapter at {position}, which its Blend needs")
        self.begin(0, 0)

    @property
    def positions(self) -> tuple[str, ...]:
        return tuple(self.sites)

    def begin(self, images: int, steps: int, device: torch.device | str = "cpu", tokens: int = 0) -> None:
        """Starts a run of `steps` model steps over `images` images; all buffers are made here.

        `tokens` is the number of image tokens, for a map of where activations moved; 0 for none.
        """
        self.sites = {p: moved(site, device) for p, site in self.sites.items()}
        self._reach = {p: [self._reach_of(a, device) for a in s.actions] for p, s in self.sites.items()}
        shape = (len(self.sites), steps, images)
        self.calls = torch.zeros(shape[:2], dtype=torch.long)  # on the CPU: counted, not computed
        self.fired = torch.zeros(shape, device=device)  # tokens moved
        self.moved = torch.zeros(shape, device=device)  # |a' - a| / |a| over the image's tokens
        self.map = torch.zeros(images, tokens, device=device)  # |a' - a| / |a| of each, summed over calls
        self.history = torch.zeros(steps, images, len(self.domains), device=device)
        self.evidence = torch.zeros(images, len(self.domains), device=device)
        gates = [self.dictionary.card.domains[name].gate for name in self.domains]
        limits = [g.threshold if g and self.gate else ALWAYS for g in gates]
        self.limit = torch.tensor(limits, device=device)
        self.step(0, 1.0, slice(0, images))

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        """Announces step `index` at noise level `sigma`; `rows` of the batch are to be steered.

        A host whose noise level is on the device passes it as a scalar tensor: the windows are then
        compared there, without waiting for it.
        """
        self.index, self.sigma, self.rows = index, sigma, rows

    def _reach_of(self, action: Action, device: torch.device | str) -> Tensor:
        """[D]: the action's strength for each domain that it acts for, else 0."""
        value = action.strength * self.strength
        applies = [action.domain in ("", name) and self.modes[name] != "observe" for name in self.domains]
        return torch.tensor([value * acts for acts in applies], device=device)

    def __call__(self, position: str, a: Tensor) -> Tensor:
        """a [batch, T, d] -> a' of the same shape and dtype; rows not acted on keep their bits.

        Raises RiskFound as soon as the gate of a domain set to `stop` opens.
        """
        site = self.sites[position]
        at = self.positions.index(position)
        self.calls[at, self.index] += 1
        windows = [action.window for action in site.actions]
        inside = [(self.sigma <= start) & (self.sigma >= end) for start, end in windows]
        if not isinstance(self.sigma, Tensor) and not any(inside):
            return a
        part = a[self.rows]
        x = part.float()
        z = site.code(x)
        seen = z.sum(1) @ site.evidence.T
        if isinstance(self.sigma, Tensor):
            seen = torch.where(torch.stack([torch.as_tensor(on) for on in inside]).any(), seen, 0.0)
        torch.maximum(self.evidence, seen, out=self.evidence)
        self.history[self.index] = self.evidence
        self._stop_on_risk(position)
        opened = (self.evidence > self.limit).float()
        strengths = [opened * reach * on for reach, on in zip(self._reach[position], inside, strict=True)]
        change, touched = site.change(x, z, strengths)
        y = x + change
        if self.preserve_norm:
            y = y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True).clamp(min=1e-6))
        out = torch.where(touched[..., None], y.to(a.dtype), part)
        moved = out.float() - x
        self.fired[at, self.index] += touched.sum(1).float()
        share = moved.norm(dim=(1, 2)) / x.norm(dim=(1, 2)).clamp(min=1e-6)
        self.moved[at, self.index] = torch.maximum(self.moved[at, self.index], share)
        if position.endswith("img") and x.shape[1] == self.map.shape[1]:
            self.map += moved.norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-6)
        if part.shape == a.shape:
            return out
        steered = a.clone()
        steered[self.rows] = out
        return steered

    def _stop_on_risk(self, position: str) -> None:
        for d, name in enumerate(self.domains):
            # the only place that waits for the device, and only where a domain is set to stop
            if self.modes[name] == "stop" and bool((self.evidence[:, d] > self.limit[d]).any()):
                images = (self.evidence[:, d] > self.limit[d]).nonzero().flatten().tolist()
                raise RiskFound(
                    f"stopped: {name} found in image {', '.join(map(str, images))} of the batch "
                    f"at step {self.index + 1} (position {position}); this domain is set to stop"
                )

    def receipt(self) -> dict:
        """What happened in the run, as plain numbers: per position, step and image."""
        limit = self.limit.tolist()
        opened = self.history > self.limit
        images = []
        for b in range(self.evidence.shape[0]):
            verdict = {}
            for d, name in enumerate(self.domains):
                at = opened[:, b, d].nonzero().flatten()
                verdict[name] = {
                    "evidence": self.evidence[b, d].item(),
                    "threshold": None if limit[d] == ALWAYS else limit[d],
                    "opened_at_step": int(at[0]) if len(at) else None,
                    "mode": self.modes[name],
                }
            images.append(verdict)
        return {
            "positions": list(self.positions),
            "calls": self.calls.tolist(),
            "tokens_fired": self.fired.tolist(),
            "relative_change": self.moved.tolist(),
            "images": images,
        }


def moved(site: Site, device: torch.device | str) -> Site:
    """The site with its tensors on `device`."""
    tensors = {f.name: getattr(site, f.name) for f in fields(site)}
    tensors = {name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)}
    return replace(
        site,
        **tensors,
        delta={d: t.to(device) for d, t in site.delta.items()},
        transferred={d: sae.to(device) for d, sae in site.transferred.items()},
    )
