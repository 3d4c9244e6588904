"""Steering: a plan compiled for one dictionary, and the runs that carry it out.

The evidence gate: each image of a batch carries one running evidence value per domain, the sum over the
domain's witnesses of the largest evidence that was read so far at each (gate.py). Sites act on an image
for a domain only while that value is over the domain's threshold; as no maximum falls, an open gate
stays open.
What is not a number counts as over it. A domain without a gate, or with its gate switched off, is
acted on in every image; found is only what is over the threshold.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from ..dictionary.conflicts import LEAST_LEFT, losses
from ..dictionary.dictionary import Action, Dictionary, DictionaryError, Gate
from .gate import evidence_of
from .site import Site, Windows, compile_site

MODES = ("steer", "observe", "stop")
UNDONE = "undone by other domains"  # a status

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class RiskFound(RuntimeError):
    """A domain set to `stop` was found, at that step in those pictures of the batch, all counted from 1."""

    def __init__(self, domain: str, pictures: Sequence[int], step: int, position: str):
        where = f"picture {', '.join(map(str, pictures))} of the batch at step {step} (position {position})"
        super().__init__(f"stopped: {domain} found in {where}; this domain is set to stop")
        self.domain, self.pictures, self.step = domain, pictures, step


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
        strengths: Mapping[str, float] | None = None,
    ):
        """`plan` defaults to the dictionary's; `modes` maps domains to steer (default), observe
        (evidence only) or stop; `strength` multiplies every action's, `strengths` what acts for
        a domain. Without `gate`, every image is acted on.

        Raises ValueError for an unknown domain, mode or position and a strength that is none; for
        observe and stop without a gate that could find the domain; for an action that can act for no
        domain; for a domain to be steered that the plan names and no action of it can act for; for numbers
        that no honest dictionary has; for a gate that nothing could open; and for an adapter that undoes what
        is done for another domain.
        """
        self.dictionary: Final = dictionary
        self.domains: Final = tuple(dictionary.card.domains)
        self.plan: Final = tuple(dictionary.card.plan if plan is None else plan)
        self.modes: Final = MappingProxyType(dict.fromkeys(self.domains, "steer") | dict(modes or {}))
        self.strength: Final = strength
        self.strengths: Final = MappingProxyType(dict.fromkeys(self.domains, 1.0) | dict(strengths or {}))
        self.gate: Final = gate
        self.preserve_norm: Final = preserve_norm
        self._require_known()
        actions: dict[str, list[Action]] = {}
        for action in self.plan:
            actions.setdefault(action.position, []).append(action)
        wanted = {*actions, *(position for at in self.witnesses.values() for position in at)}
        architecture = dictionary.card.architecture
        known = architecture.positions()
        for position in wanted.difference(known):
            architecture.require(position)
        sites = {
            position: compile_site(dictionary, position, self.domains, actions.get(position, ()))
            for position in known
            if position in wanted
        }
        self.sites: Final[Mapping[str, Site]] = MappingProxyType(sites)
        self._require_effect()
        self._require_gates()
        self._require_peace()

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
        """Where each domain's evidence is read, whatever the plan."""
        gates = {name: self.gate_of(name) for name in self.domains}
        return {name: [] if gate is None else list(gate.witnesses) for name, gate in gates.items()}

    def gate_of(self, domain: str) -> Gate | None:
        """What tells when a domain is found; None where the dictionary has none."""
        return self.dictionary.card.domains[domain].gate

    def run(
        self, sites: Mapping[str, Site] | None = None, thresholds: Mapping[str, float] | None = None
    ) -> Run:
        """A tap for one sampling. `sites`: these ones, where they are elsewhere already; `thresholds`, by
        domain: these in place of the dictionary's own (calibration.py)."""
        return Run(self, self.sites if sites is None else sites, thresholds or {})

    def _require_known(self) -> None:
        path = self.dictionary.path
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"the strength is {self.strength}: it must be a number, 0 or more")
        for name, mode in self.modes.items():
            if name not in self.domains:
                raise ValueError(f"no domain '{name}' in {path}: it has {', '.join(self.domains)}")
            if mode not in MODES:
                raise ValueError(f"unknown mode '{mode}' for domain '{name}': expected {', '.join(MODES)}")
            if mode != "steer" and self.gate_of(name) is None:
                raise DictionaryError(
                    f"{path}: domain '{name}' has no gate that could find it: set it to steer, not to {mode}"
                )
        for action in self.plan:
            if action.domain and action.domain not in self.domains:
                raise ValueError(f"the plan names domain '{action.domain}', which {path} lacks")

    def _require_effect(self) -> None:
        """That no action is idle, and no domain left out by all actions that are for it."""
        served: dict[str, list[Action]] = {}
        for action in self.plan:
            meant = [name for name in self.domains if action.domain in ("", name)]
            able = [name for name in meant if self._can_act(action, name)]
            if not able:
                raise DictionaryError(
                    f"{self.dictionary.path}: nothing at {action.position} serves the plan's {action.form} "
                    f"{action.operator} for {' and '.join(meant) or 'no domain'}. Choose another position "
                    "or operator."
                )
            for name in meant:
                served.setdefault(name, []).extend([action] if name in able else [])
        for name, actions in served.items():
            if not actions and self.modes[name] == "steer":
                raise DictionaryError(
                    f"{self.dictionary.path}: the plan could never act for '{name}', for which there is "
                    f"nothing at {', '.join(self.acting)}. Choose other positions or operators, or set "
                    f"'{name}' to observe."
                )

    def _require_gates(self) -> None:
        """That some activation could open each gate."""
        for d, name in enumerate(self.domains):
            gate = self.gate_of(name)
            most = sum(self.sites[position].most[d] for position in gate.witnesses) if gate else math.inf
            if gate and most <= gate.threshold:
                path = self.dictionary.adapter_paths.get(name, self.dictionary.path)
                raise DictionaryError(
                    f"{path}: the gate of '{name}' could never open: it opens over {gate.threshold:.3g}, and "
                    f"no activation gives it evidence over {most:.3g}. Make it again, or get it again from "
                    "its source."
                )

    def _require_peace(self) -> None:
        """That no adapter undoes what is done for another domain."""
        adapters = self.dictionary.adapter_paths
        if not adapters:
            return
        strengths = {n: 0.0 if self.modes[n] == "observe" else self.strengths[n] for n in self.domains}
        for loss in losses(self.dictionary, self.plan, strengths):
            if loss.left < LEAST_LEFT and loss.culprit in adapters and loss.culprit != loss.domain:
                raise DictionaryError(
                    f"{adapters[loss.culprit]}: {loss}. Leave that adapter out, or set it to observe."
                )

    def _can_act(self, action: Action, domain: str) -> bool:
        """Whether the action has rows to act with for this domain."""
        site, d = self.sites[action.position], self.domains.index(domain)
        if action.form == "paper":  # acts on every token, whatever fires
            return True
        return d in site.delta if action.operator == "blend" else bool(site.member[d].any())


class Run:
    """One sampling that a Steering acts in, and what it found: a tap.

    After `begin`, `history` [S, B, D] is the evidence by step, and `map` [B, tokens] how far each
    image token moved, |a' - a| / |a| summed over calls; both on the device.
    """

    def __init__(self, steering: Steering, sites: Mapping[str, Site], thresholds: Mapping[str, float]):
        self.steering = steering
        gates = {name: steering.gate_of(name) for name in steering.domains}
        own = {name: gate.threshold if gate else None for name, gate in gates.items()}
        self.thresholds = own | dict(thresholds)
        self.positions = steering.positions
        self._given = sites
        self._beside: list[weakref.ref[Run]] = []  # no circle: what it holds goes when a sampling ends
        self._acted: dict[tuple[str, int | None], _Acted] = {}  # in this pass, by position and first row

    def meet(self, other: Run) -> None:
        """Says that both act in one sampling: what one changes counts in what is `left` of the other's."""
        self._beside.append(weakref.ref(other))
        other._beside.append(weakref.ref(self))

    def end_pass(self) -> None:
        """Announces that a forward pass is over. Only runs that have met need it."""
        self._acted.clear()

    def begin(self, images: int, steps: int, device: torch.device, tokens: int = 0) -> None:
        """Starts a sampling of `steps` model steps over `images` images; all buffers are made here.

        `tokens` is the number of image tokens, for a map of where activations moved; 0 for none.
        """
        plan, domains = self.steering, len(self.steering.domains)
        self._places = {p: _Place(plan, site.to(device), device) for p, site in self._given.items()}
        limits = list(self.thresholds.values())
        self._gated = torch.tensor([limit is not None for limit in limits], device=device)
        self._always = ~self._gated | torch.tensor(not plan.gate, device=device)
        self._limit = torch.tensor([math.inf if limit is None else limit for limit in limits], device=device)
        shape = (len(self.positions), steps, images)
        self._calls = torch.zeros(shape[:2], dtype=torch.long)  # on the CPU: counted, not computed
        self._tokens = torch.zeros(shape, dtype=torch.long, device=device)  # moved
        self._change = torch.zeros(shape, device=device)
        self._tokens_of = torch.zeros(images, domains, dtype=torch.long, device=device)  # moved by a domain
        self._own = torch.zeros(images, domains, device=device)  # |c|^2 of what it alone would change
        self._left = torch.zeros(images, domains, device=device)  # <c, a' - a>
        self._looked = torch.zeros(len(self.positions), domains, dtype=torch.long, device=device)
        self._largest = torch.zeros(len(self.positions), images, domains, device=device)
        self.history = torch.zeros(steps, images, domains, device=device)
        self.map = torch.zeros(images, tokens, device=device)

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        """Announces step `index` at noise level `sigma`; `rows` of the batch are the images."""
        self._index, self._sigma, self._rows = index, sigma, rows
        self.history[index] = self._evidence()

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
        if len(part) != self._largest.shape[1]:
            raise ValueError(f"{len(part)} rows at {position}, in a run of {self._largest.shape[1]} images")
        x = part.float()
        z = place.site.code(x)
        if looks:
            self._look(position, place, z)
        if not acts:
            return a
        out = self._act(position, place, part, x, z)
        if part.shape == a.shape:
            return out
        steered = a.clone()
        steered[self._rows] = out
        return steered

    def _evidence(self) -> Tensor:
        """[B, D], of all witnesses together so far."""
        return self._largest.sum(0)

    def _found(self, evidence: Tensor) -> Tensor:
        """[..., D] -> whether it is over the threshold; what is no number counts as over it."""
        return ~(evidence <= self._limit) & self._gated

    def _look(self, position: str, place: _Place, z: Tensor) -> None:
        """Reads the evidence of the domains that have a witness here."""
        within = place.witness.hold(self._sigma)  # [D]
        seen = torch.where(within, evidence_of(place.site, z, position), 0.0)
        at = self.positions.index(position)
        self._largest[at] = torch.maximum(self._largest[at], seen)
        self.history[self._index] = evidence = self._evidence()
        self._looked[at] += within
        for d, name in enumerate(self.steering.domains):
            if self.steering.modes[name] != "stop":
                continue
            found = self._found(evidence)[:, d].nonzero().flatten().tolist()  # waits for the device
            if found:
                raise RiskFound(name, [image + 1 for image in found], self._index + 1, position)

    def _act(self, position: str, place: _Place, part: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """`part` (`x` in float32, of code `z`) as the site's actions leave it, and what that moved."""
        at, whole = self.positions.index(position), place.site.reconstruct(x)
        within = place.windows.hold(self._sigma)[:, None]  # [A, 1]
        self._looked[at] += (place.meant & within).any(0) & ~self._gated
        acting = self._always | self._found(self._evidence())  # [B, D]
        strengths = acting * (place.reach * within)[:, None]  # [A, B, D]

        def steered(strengths: Tensor) -> Tensor:
            change, touched = place.site.change(x, z, whole, strengths)
            y = x + change
            if self.steering.preserve_norm:
                y = y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True).clamp(min=1e-6))
            y = y.to(part.dtype)
            return torch.where(touched[..., None] & (y != part), y, part)  # -0.0 + 0.0 would be 0.0

        def count(change: Tensor) -> None:  # another run's, of the same tokens
            for d, only in place.acting:
                alone = step if len(place.acting) == 1 else steered(strengths * only).float() - x
                self._left[:, d] += (alone * change).sum((1, 2))

        out = steered(strengths)
        moved, step = _differs(out, part), out.float() - x
        self._tokens[at, self._index] += moved.sum(1)
        here = position, self._rows.start
        others = [run for known in self._beside if (run := known()) is not None]
        met = [run._acted[here] for run in others if here in run._acted]
        total = sum((there.step for there in met), step)
        for d, only in place.acting:
            own, alone = moved, step
            if len(place.acting) > 1:  # of those tokens, the ones that it alone would have moved
                without = steered(strengths * only)
                own, alone = moved & _differs(without, part), without.float() - x
            self._tokens_of[:, d] += own.sum(1)
            self._own[:, d] += alone.square().sum((1, 2))
            self._left[:, d] += (alone * total).sum((1, 2))
        for there in met:
            there.count(step)
        if self._beside:
            self._acted[here] = _Acted(step, count)
        share = step.norm(dim=(1, 2)) / x.norm(dim=(1, 2)).clamp(min=1e-6)
        self._change[at, self._index] = torch.maximum(self._change[at, self._index], share)
        if position.endswith("img") and x.shape[1] == self.map.shape[1]:
            self.map += step.norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-6)
        return out

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
                                have acted); `unread`, the witnesses that never were; `found_at_step`, from
                                0, or None; `tokens_moved` by its own actions; `left`, what share of their
                                change came out beside other domains' changes, None where they change
                                nothing; and its `status`
        """
        plan, found = self.steering, self._found(self.history).tolist()
        evidence, looked = self._evidence().tolist(), self._looked.sum(0).tolist()
        own, left = self._own.tolist(), self._left.tolist()
        read = dict(zip(self.positions, self._looked.tolist(), strict=True))
        images: list[dict[str, Any]] = []
        for b, by_domain in enumerate(self._tokens_of.tolist()):
            verdict: dict[str, Any] = {}
            for d, name in enumerate(plan.domains):
                gate, mode, moved = plan.gate_of(name), plan.modes[name], by_domain[d]
                at = next((s for s, step in enumerate(found) if step[b][d]), None)
                unread = [position for position in plan.witnesses[name] if not read[position][d]]
                share = left[b][d] / own[b][d] if own[b][d] else None
                verdict[name] = {
                    "mode": mode,
                    "evidence": _finite(evidence[b][d]) if gate and looked[d] else None,
                    "threshold": self.thresholds[name],
                    "looked": looked[d],
                    "unread": unread,
                    "found_at_step": at,
                    "tokens_moved": moved,
                    "left": None if share is None else _finite(share),
                    "status": status(
                        mode, gate is not None, 0 if unread else looked[d], at is not None, moved, share
                    ),
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


def status(mode: str, gated: bool, looked: int, found: bool, moved: int, left: float | None = None) -> str:
    """What became of one domain in one image, in words.

    `gated`: it has a gate; `looked`: how often it was looked at, 0 where a witness never was; `found`: its
    evidence went over the threshold; `moved`: tokens that its actions changed; `left`: what share of that
    change other domains left.
    """
    if found and mode == "observe":
        return "observed"
    if moved and left is not None and left < LEAST_LEFT:
        return UNDONE
    if found:
        return "steered" if moved else "found, nothing moved"
    if moved:
        return "steered without evidence"
    if not looked:
        return "not looked at"
    return "clear" if gated else "nothing moved"


@dataclass(frozen=True)
class _Acted:
    """What a run did at one position to its rows, until the pass is over."""

    step: Tensor  # [B, T, d]
    count: Callable[[Tensor], None]  # adds another run's change to what is left of it


class _Place:
    """A site made ready for a run: A actions, D domains."""

    def __init__(self, plan: Steering, site: Site, device: torch.device):
        pairs = [(action, name) for action in site.actions for name in plan.domains]
        shape, one = (len(site.actions), len(plan.domains)), torch.eye(len(plan.domains), device=device)
        meant = [action.domain in ("", name) for action, name in pairs]
        reach = [
            action.strength * plan.strength * plan.strengths[name]
            if is_meant and plan.modes[name] != "observe"
            else 0.0
            for (action, name), is_meant in zip(pairs, meant, strict=True)
        ]
        self.site = site
        self.witness = Windows(site.witness, device)
        self.windows = Windows([action.window for action in site.actions], device)
        self.meant = torch.tensor(meant, dtype=torch.bool, device=device).reshape(shape)
        self.reach = torch.tensor(reach, device=device).reshape(shape)  # strengths
        self.acting = [(d, one[d]) for d in range(shape[1]) if any(reach[d :: shape[1]])]


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """[B, T]: the tokens of a [B, T, d] that have other bits than those of b, of the same dtype."""
    return (a.view(_BITS[a.element_size()]) != b.view(_BITS[b.element_size()])).any(-1)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
