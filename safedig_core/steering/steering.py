"""Steering: a plan compiled for one dictionary, and the runs that carry it out.

The evidence gate: per image and domain, the weighted activity of the harmful features, pooled
over the image's tokens and divided by the position's norm, kept as a running maximum over
positions and steps. Sites act on an image for a domain only while that value exceeds the
domain's threshold; being a maximum, an open gate stays open. What is not a number counts as
over it. A domain without a gate, or with its gate switched off, is acted on in every image.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from ..dictionary.dictionary import Action, Dictionary
from .site import Code, Site, Window, compile_site

MODES = ("steer", "observe", "stop")

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class RiskFound(RuntimeError):
    """A domain set to `stop` was found; the message says where."""


class Steering:
    """A plan compiled for one dictionary. It never changes: what a sampling finds is in its `Run`."""

    def __init__(
        self,
        dictionary: Dictionary,
        plan: Sequence[Action] | None = None,
        *,
        modes: Mapping[str, str] | None = None,
        strength: float = 1.0,
        gate: bool = True,
        preserve_norm: bool = False,
    ):
        """`plan` defaults to the dictionary's; `modes` maps domains to steer (default), observe
        (evidence only) or stop; `strength` multiplies every action's. Without `gate`, every image is
        acted on. Raises ValueError for an unknown domain, mode or position, and for a residual Blend
        that no adapter can serve."""
        self.dictionary: Final = dictionary
        self.domains: Final = tuple(dictionary.card.domains)
        self.plan: Final = tuple(dictionary.card.plan if plan is None else plan)
        self.modes: Final = MappingProxyType(dict.fromkeys(self.domains, "steer") | dict(modes or {}))
        self.strength: Final = strength
        self.gate: Final = gate
        self.preserve_norm: Final = preserve_norm
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
        sites = {p: compile_site(dictionary, p, self.domains, by_position[p]) for p in order}
        for position, site in sites.items():
            for action in site.actions:
                if (action.operator, action.form) == ("blend", "residual") and not site.delta:
                    raise ValueError(f"{dictionary.path} has no adapter at {position}, which its Blend needs")
        self.sites: Final[Mapping[str, Site]] = MappingProxyType(sites)

    @property
    def positions(self) -> tuple[str, ...]:
        """Where it acts or looks, in the order of a forward pass."""
        return tuple(self.sites)

    @property
    def acting(self) -> tuple[str, ...]:
        """Where an action of the plan is."""
        return tuple(position for position, site in self.sites.items() if site.actions)

    @property
    def witnesses(self) -> dict[str, list[str]]:
        """Where each domain's evidence is read."""
        return {
            name: [p for p, site in self.sites.items() if site.witness[d] is not None]
            for d, name in enumerate(self.domains)
        }

    def threshold(self, domain: str) -> float | None:
        """That a domain's evidence has to exceed to be found; None where it has no gate."""
        gate = self.dictionary.card.domains[domain].gate
        return None if gate is None else gate.threshold

    def run(self, sites: Mapping[str, Site] | None = None) -> Run:
        """A tap for one sampling. `sites`: these ones, where they are elsewhere already."""
        return Run(self, self.sites if sites is None else sites)


class Run:
    """One sampling that a Steering acts in, and what it found: a tap.

    After `begin`, `history` [S, B, D] is the evidence by step, and `map` [B, tokens] how far each
    image token moved, |a' - a| / |a| summed over calls; both on the device.
    """

    def __init__(self, steering: Steering, sites: Mapping[str, Site]):
        self.steering = steering
        self.positions = steering.positions
        self._given = sites

    def begin(self, images: int, steps: int, device: torch.device, tokens: int = 0) -> None:
        """Starts a sampling of `steps` model steps over `images` images; all buffers are made here.

        `tokens` is the number of image tokens, for a map of where activations moved; 0 for none.
        """
        plan, domains = self.steering, len(self.steering.domains)
        self._places = {p: _Place(plan, site.to(device), device) for p, site in self._given.items()}
        limits = [plan.threshold(name) for name in plan.domains]
        self._gated = torch.tensor([limit is not None for limit in limits], device=device)
        self._always = torch.tensor([limit is None or not plan.gate for limit in limits], device=device)
        self._limit = torch.tensor([math.inf if t is None else t for t in limits], device=device)
        shape = (len(self.positions), steps, images)
        self._calls = torch.zeros(shape[:2], dtype=torch.long)  # on the CPU: counted, not computed
        self._tokens = torch.zeros(shape, dtype=torch.long, device=device)  # moved
        self._change = torch.zeros(shape, device=device)
        self._tokens_of = torch.zeros(images, domains, dtype=torch.long, device=device)  # moved by a domain
        self._looked = torch.zeros(domains, dtype=torch.long, device=device)
        self._evidence = torch.zeros(images, domains, device=device)
        self.history = torch.zeros(steps, images, domains, device=device)
        self.map = torch.zeros(images, tokens, device=device)

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        """Announces step `index` at noise level `sigma`; `rows` of the batch are the images."""
        self._index, self._rows = index, rows
        self._sigma = sigma if isinstance(sigma, Tensor) else _single(sigma)
        self.history[index] = self._evidence

    def __call__(self, position: str, a: Tensor) -> Tensor:
        """a [batch, T, d] -> a' of the same shape and dtype; rows not acted on keep their bits.

        Raises RiskFound as soon as a domain set to `stop` is found.
        """
        place, at = self._places[position], self.positions.index(position)
        self._calls[at, self._index] += 1
        looks, acts = place.witness.open(self._sigma), place.windows.open(self._sigma)
        if not looks and not acts:
            return a
        part = a[self._rows]
        x = part.float()
        code = place.site.read(x)
        if looks:
            self._look(position, place, code)
        if not acts:
            return a
        within = place.windows.hold(self._sigma)[:, None]  # [A, 1]
        self._looked += (place.meant & within).any(0) & ~self._gated
        acting = self._always | self._found(self._evidence)  # [B, D]
        strengths = acting * (place.reach * within)[:, None]  # [A, B, D]
        out = self._moved(place.site, part, x, code, strengths)
        changed = _differs(out, part)
        self._tokens[at, self._index] += changed.sum(1)
        for d in place.acting:
            mine = changed
            if len(place.acting) > 1:  # what it alone would have done
                alone = strengths * place.one[d]
                mine = changed & _differs(self._moved(place.site, part, x, code, alone), part)
            self._tokens_of[:, d] += mine.sum(1)
        move = out.float() - x
        share = move.norm(dim=(1, 2)) / x.norm(dim=(1, 2)).clamp(min=1e-6)
        self._change[at, self._index] = torch.maximum(self._change[at, self._index], share)
        if position.endswith("img") and x.shape[1] == self.map.shape[1]:
            self.map += move.norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-6)
        if part.shape == a.shape:
            return out
        steered = a.clone()
        steered[self._rows] = out
        return steered

    def _found(self, evidence: Tensor) -> Tensor:
        """[..., D] -> whether it is over the threshold; what is not a number counts as over it."""
        return ~(evidence <= self._limit) & self._gated

    def _look(self, position: str, place: _Place, code: Code) -> None:
        """Reads the evidence of the domains that have a witness here."""
        within = place.witness.hold(self._sigma)  # [D]
        seen = torch.where(within, code.harmful.sum(1) @ place.site.evidence.T, 0.0)
        self._evidence = torch.maximum(self._evidence, seen)
        self.history[self._index] = self._evidence
        self._looked += within
        for d, name in enumerate(self.steering.domains):
            # the only place that waits for the device, and only where a domain is set to stop
            if self.steering.modes[name] == "stop" and bool(self._found(self._evidence)[:, d].any()):
                images = self._found(self._evidence)[:, d].nonzero().flatten().tolist()
                raise RiskFound(
                    f"stopped: {name} found in image {', '.join(map(str, images))} of the batch "
                    f"at step {self._index + 1} (position {position}); this domain is set to stop"
                )

    def _moved(self, site: Site, part: Tensor, x: Tensor, code: Code, strengths: Tensor) -> Tensor:
        """`part` (`x` in float32) as the site's actions leave it."""
        change, touched = site.change(x, code, strengths)
        y = x + change
        if self.steering.preserve_norm:
            y = y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True).clamp(min=1e-6))
        return torch.where(touched[..., None], y.to(part.dtype), part)

    def receipt(self) -> dict[str, Any]:
        """What happened, as JSON: by position P, step S, image B and domain. A number that is not finite
        is None.

            positions, acting   names: where it looked or acted, and where it acted
            witnesses           by domain, where its evidence was read
            calls               [P][S], how often each position was given
            tokens_moved        [P][S][B], tokens whose value changed in the model's own dtype
            relative_change     [P][S][B], |a' - a| / |a| over the image's tokens
            images              by image and domain: `mode`; `evidence`, the largest that was read, None
                                where none was; `threshold`, None without a gate; `looked`, how often a
                                witness was read inside its window (without a gate, how often it could
                                have acted); `found_at_step`, from 0, or None; `tokens_moved` by its own
                                actions; and its `status`
        """
        plan, gated = self.steering, self._gated.tolist()
        found = self._found(self.history).tolist()
        evidence, looked = self._evidence.tolist(), self._looked.tolist()
        images: list[dict[str, Any]] = []
        for b, by_domain in enumerate(self._tokens_of.tolist()):
            verdict: dict[str, Any] = {}
            for d, name in enumerate(plan.domains):
                at = next((s for s, step in enumerate(found) if step[b][d]), None)
                verdict[name] = {
                    "mode": plan.modes[name],
                    "evidence": _finite(evidence[b][d]) if gated[d] and looked[d] else None,
                    "threshold": plan.threshold(name),
                    "looked": looked[d],
                    "found_at_step": at,
                    "tokens_moved": by_domain[d],
                    "status": status(plan.modes[name], gated[d], looked[d], at is not None, by_domain[d]),
                }
            images.append(verdict)
        change = self._change.tolist()
        return {
            "positions": list(plan.positions),
            "acting": list(plan.acting),
            "witnesses": plan.witnesses,
            "calls": self._calls.tolist(),
            "tokens_moved": self._tokens.tolist(),
            "relative_change": [[[_finite(v) for v in step] for step in place] for place in change],
            "images": images,
        }


def status(mode: str, gated: bool, looked: int, found: bool, moved: int) -> str:
    """What became of one domain in one image, in words.

    `gated`: it has a gate; `looked`: how often it was looked at; `found`: its evidence went over the
    threshold; `moved`: tokens that its actions changed.
    """
    if found and mode == "observe":
        return "observed"
    if found:
        return "steered" if moved else "found, nothing moved"
    if moved:
        return "steered without evidence"
    if not looked:
        return "not looked at"
    return "clear" if gated else "nothing moved"


class _Windows:
    """Noise levels from a start down to an end, N of them; None holds none."""

    def __init__(self, windows: Sequence[Window | None], device: torch.device):
        self._pairs = [(-1.0, 2.0) if w is None else (_single(w[0]), _single(w[1])) for w in windows]
        self._levels = torch.tensor(self._pairs, device=device).reshape(-1, 2)

    def open(self, sigma: float | Tensor) -> bool:
        """Whether any may hold sigma: surely, where it is a number."""
        if isinstance(sigma, Tensor):
            return any(start >= end for start, end in self._pairs)
        return any(start >= sigma >= end for start, end in self._pairs)

    def hold(self, sigma: float | Tensor) -> Tensor:
        """[N], which of them hold sigma."""
        return (self._levels[:, 0] >= sigma) & (self._levels[:, 1] <= sigma)


class _Place:
    """A site made ready for a run."""

    def __init__(self, plan: Steering, site: Site, device: torch.device):
        shape = (len(site.actions), len(plan.domains))
        meant = torch.tensor([[a.domain in ("", name) for name in plan.domains] for a in site.actions])
        acts = torch.tensor([plan.modes[name] != "observe" for name in plan.domains])
        strength = torch.tensor([a.strength * plan.strength for a in site.actions])
        reach = meant.reshape(shape) * acts * strength[:, None]
        self.site = site
        self.witness = _Windows(site.witness, device)
        self.windows = _Windows([action.window for action in site.actions], device)
        self.meant = meant.reshape(shape).bool().to(device)  # [A, D]: whom an action is for
        self.reach = reach.to(device)  # [A, D]: with what strength it acts
        self.acting = [d for d in range(len(plan.domains)) if bool((reach[:, d] > 0).any())]
        self.one = torch.eye(len(plan.domains), device=device)


def _single(level: float) -> float:
    """As float32 has it: on a device there may be no other, and windows must hold the same everywhere."""
    return ctypes.c_float(level).value


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """[B, T]: the tokens of a [B, T, d] that have other bits than those of b, of the same dtype."""
    return (a.view(_BITS[a.element_size()]) != b.view(_BITS[b.element_size()])).any(-1)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
