"""The operator's policy: what a server does to every picture, whatever a workflow asks for.

A JSON file outside of every workflow; docs/policy.schema.json describes it for other tools, what this reader
accepts is what counts. What enforces it in ComfyUI is nodes/bridge/enforcement.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .dictionary.dictionary import Dictionary
from .files import DOMAIN, blame, build, need, parse_object, read_all, sha256_of
from .signing import read_key
from .steering.calibration import Calibration, read_calibration
from .steering.steering import MODES, Steering

FORMAT = 1
POLICIES = ("block", "warn")
MAX_BYTES = 1 << 20  # of a policy file

_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = "Correct it and start again; docs/policy.md describes the file."


class PolicyError(ValueError):
    """A policy file that can't be followed; the message names it and the fault."""


@dataclass(frozen=True)
class Rule:
    """What holds for one domain, at least. `policy`: what a run that isn't steered as planned ends in."""

    action: str = "steer"
    strength: float = 1.0
    policy: str = "block"

    def __post_init__(self) -> None:
        need(self.action in MODES, f"an action must be one of {', '.join(MODES)}")
        need(0 < self.strength <= 10, "a strength must be over 0, and at most 10")
        need(self.policy in POLICIES, f"a domain's policy must be one of {', '.join(POLICIES)}")


@dataclass(frozen=True)
class File:
    """A file by its name, in the policy's folder or absolute, and by its content."""

    file: str
    sha256: str

    def __post_init__(self) -> None:
        need(self.file, "a file has no name")
        need(_SHA256.fullmatch(self.sha256), f"the sha256 of {self.file:.60} must be 64 hex digits")


@dataclass(frozen=True)
class Required(File):
    """A dictionary that acts on every model that it is made for, and calibrations that it may choose from."""

    adapters: list[File] = field(default_factory=list)
    calibrations: list[File] = field(default_factory=list)


@dataclass(frozen=True)
class Audit:
    """The audit log: how large a file may grow, and how many older ones are kept."""

    file: str
    megabytes: int = 16
    files: int = 8

    def __post_init__(self) -> None:
        need(self.file, "the audit log has no name")
        need(1 <= self.megabytes <= 4096, "megabytes of the audit log must lie in 1 to 4096")
        need(1 <= self.files <= 1000, "files of the audit log must lie in 1 to 1000")


@dataclass(frozen=True)
class Duty:
    """What a required dictionary does to every run, and the calibrations that it may choose from."""

    steering: Steering
    calibrations: list[Calibration]


@dataclass(frozen=True)
class Content:
    """What stands in the file."""

    format: int
    dictionaries: list[Required]
    domains: dict[str, Rule] = field(default_factory=dict)  # required ones
    exempt_models: list[str] = field(default_factory=list)  # classes of models that run unsteered
    signing_key: str | None = None
    audit: Audit | None = None

    def __post_init__(self) -> None:
        need(self.format == FORMAT, f"its format is {self.format}; this version reads {FORMAT}")
        for name in self.domains:
            need(DOMAIN.fullmatch(name), f"'{name:.60}' is no name of a domain")


class Policy:
    """A policy that was read, with its dictionaries open and its key in memory: later changes to the files
    change nothing."""

    def __init__(self, path: Path):
        """Raises PolicyError."""
        with blame(PolicyError, path, _REMEDY):
            raw = read_all(path, MAX_BYTES)
            self.content: Content = build(Content, parse_object(raw.decode("utf-8"), "the policy"), "policy")
            self.path, self.sha256 = path, hashlib.sha256(raw).hexdigest()
            key = self.content.signing_key
            self.key = None if key is None else read_key(self.at(key))
            self.duties = [self._duty(each) for each in self.content.dictionaries]
            known = {name for duty in self.duties for name in duty.steering.domains}
            for name in self.content.domains.keys() - known:
                raise ValueError(f"no dictionary of it knows the domain '{name}'")

    def at(self, name: str) -> Path:
        """Where a file of the policy is."""
        return self.path.parent / name

    def rule(self, domain: str) -> Rule:
        return self.content.domains.get(domain, Rule())

    def strictness(self, domains: Iterable[str]) -> str:
        """What a run that isn't steered as planned ends in: of these domains' policies, the strictest."""
        return "block" if any(self.rule(name).policy == "block" for name in domains) else "warn"

    def is_met(self, duty: Duty, steering: Steering, calibrations: Sequence[Calibration]) -> bool:
        """Whether a workflow's own steering, which chooses from these calibrations, does at least what a
        dictionary of the policy has to."""
        own, theirs = duty.steering, steering.dictionary
        return (
            (theirs.sha256, theirs.adapter_sha256) == (own.dictionary.sha256, own.dictionary.adapter_sha256)
            and steering.plan == own.plan
            and not steering.preserve_norm
            and list(calibrations) == duty.calibrations
            and all(
                steering.strength * steering.strengths[name] >= self.rule(name).strength
                and steering.modes[name] in (self.rule(name).action, "stop")
                for name in own.domains
            )
        )

    def _duty(self, required: Required) -> Duty:
        for file in (required, *required.adapters, *required.calibrations):
            found = sha256_of(self.at(file.file))
            need(found == file.sha256, f"{file.file} has the SHA-256 {found}, not {file.sha256}")
        dictionary = Dictionary.open(self.at(required.file)).with_adapters(
            *(self.at(adapter.file) for adapter in required.adapters)
        )
        need(dictionary.card.plan, f"{required.file} has no plan, so it could steer nothing")
        steering = Steering(
            dictionary,
            modes={name: self.rule(name).action for name in dictionary.card.domains},
            strengths={name: self.rule(name).strength for name in dictionary.card.domains},
        )
        return Duty(steering, [read_calibration(self.at(file.file)) for file in required.calibrations])
