"""The operator's policy in force: every sampler run is steered as it says, or refused, whatever the workflow.

Only where there is a policy, two places of ComfyUI are hooked:

    CFGGuider.outer_sample      the hook on the sampler. What every guider's run comes to, inside of all that
                                other nodes have put around it: the policy's dictionaries are attached to
                                this one run.
    BaseModel.diffusion_model   the lock. Whatever is put there can't be called, nor can its blocks, but
                                in a forward pass of such a run. So what goes past the sampler is refused.

What passes by both is in docs/policy.md.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from ...safedig_core.policy import Duty, Policy
from ...safedig_core.signing import keyed, sign
from ...safedig_core.steering.calibration import Calibration
from ...safedig_core.steering.steering import RiskFound
from .attachment import Attachment, NotSteered, attachments_of, run_with
from .audit import AuditLog
from .ledger import Record, executing, signature
from .models import architecture_of, transformer_of
from .steered import SteeringAttachment

log = logging.getLogger("safedig")

NAME = "The operator's policy"
# by which other nodes may paint something else than what leads away from the negative prompt
_GUIDANCE_FUNCTIONS = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")
_GUIDANCE_WRAPPERS = ("predict_noise", "calc_cond_batch")

_here = threading.local()  # .run: the Run that goes on in this thread, or none


class PolicyAttachment(SteeringAttachment):
    """A dictionary of the policy, for one run. No receipt speaks of it: the audit log does."""

    remedy = "Remove what skips or replaces parts of the model: no setting of a workflow changes the policy."

    def __init__(self, duty: Duty, *args: Any):
        super().__init__(duty.steering, "", executing().node, *args)
        self._calibrations = duty.calibrations

    def calibrations(self) -> list[Calibration]:
        return self._calibrations

    def _file(self, record: Record) -> None:
        pass


class Run:
    """One sampler run that is steered: by these attachments, in this transformer."""

    def __init__(self, attachments: list[SteeringAttachment], transformer: Any):
        self.attachments, self.transformer = attachments, transformer
        self.called: dict[torch.nn.Module, int] = {}  # in which forward pass a module was called last

    def permits(self, root: Any, module: torch.nn.Module) -> bool:
        """Whether this module of a transformer may be called now: once in each of the run's passes."""
        now = self.attachments[0].forward_pass
        inside = root is self.transformer and all(each.forward_pass for each in self.attachments)
        again = self.called.get(module) == now
        self.called[module] = now
        return inside and not again


class Enforcement:
    """A policy, or the fault for which nothing is sampled at all."""

    def __init__(self, policy: Policy | None, fault: str = ""):
        self.policy, self.fault = policy, fault
        self._locked: WeakSet[torch.nn.Module] = WeakSet()
        self._audit: AuditLog | None = None
        if policy is not None and policy.content.audit is not None:
            audit = policy.content.audit
            self._audit = AuditLog(policy.at(audit.file), audit.megabytes, audit.files)

    def sample(self, outer_sample: Callable, guider: Any, noise: Any, *args, **kwargs) -> Any:
        """In place of a guider's outer_sample. Raises NotSteered, RiskFound."""
        if self._is_exempt(guider.model_patcher.model):
            return outer_sample(guider, noise, *args, **kwargs)
        attachments: list[SteeringAttachment] = []
        earlier = getattr(_here, "run", None)
        try:
            met, added = self._attachments(guider)
            attachments += [*met, *added]
            if attachments:
                _here.run = Run(attachments, transformer_of(guider.model_patcher))
            run = functools.partial(outer_sample, guider)
            out = run_with(added, guider, run, noise, *args, **kwargs)
            self._require_looked(attachments)
        except BaseException as error:  # interrupted ones too
            self._tell(len(noise), attachments, error)
            raise
        finally:
            _here.run = earlier
        self._tell(len(noise), attachments)
        return out

    def lock(self, model: Any, transformer: Any) -> None:
        """Makes a model's transformer and its blocks refuse calls that no steered run makes."""
        if self._is_exempt(model) or transformer in self._locked:
            return
        if not isinstance(transformer, torch.nn.Module):
            raise self._refusal(f"nothing can keep {type(transformer).__name__} from running unsteered")
        root = getattr(transformer, "_orig_mod", transformer)
        hook = functools.partial(self._check_call, root)
        parts = [part for child in transformer.children() for part in _parts(child)]
        for module in (transformer, *parts):
            if module not in self._locked:
                self._locked.add(module)
                module.register_forward_pre_hook(hook)

    def sign(self, receipt: dict[str, Any]) -> dict[str, Any]:
        """A receipt that goes into a file, with the policy's hash and, where it has a key, signed."""
        if self.policy is None:
            return receipt
        receipt = receipt | {"operator_policy": self.policy.sha256}
        return receipt if self.policy.key is None else sign(receipt, self.policy.key)

    def status(self) -> dict[str, Any]:
        """For who watches the server; no paths."""
        if self.policy is None:
            return {"policy": "broken", "samples": False}
        content = self.policy.content
        return {
            "policy": self.policy.sha256,
            "samples": True,
            "dictionaries": [each.sha256 for each in content.dictionaries],
            "signs": self.policy.key is not None,
            "audits": self._audit is not None,
        }

    def _is_exempt(self, model: Any) -> bool:
        """Whether a model runs unsteered: all do where the policy has no dictionary, and only signs."""
        if self.policy is None:
            return False
        return not self.policy.duties or type(model).__name__ in self.policy.content.exempt_models

    def _attachments(self, guider: Any) -> tuple[list[SteeringAttachment], list[SteeringAttachment]]:
        """The workflow's own that meet the policy, and those to add so that all of it is met."""
        if self.policy is None:
            raise NotSteered(self.fault)
        try:
            architecture = architecture_of(guider.model_patcher)
        except ValueError as error:
            raise self._refusal(str(error)) from error
        fitting = [
            duty
            for duty in self.policy.duties
            if duty.steering.dictionary.card.architecture.fits(architecture)
        ]
        served = {name for duty in fitting for name in duty.steering.domains}
        missing = self.policy.content.domains.keys() - served
        if missing or not fitting:
            wanted = f"knows {' and '.join(sorted(missing))} in it" if missing else "is made for it"
            raise self._refusal(f"the model is a {architecture.describe()}, and no dictionary {wanted}")
        found = attachments_of(guider)
        present = [each for each in found if isinstance(each, SteeringAttachment)]
        if present != found:
            raise self._refusal("steered activations would be captured. Capture on a server without a policy")
        branch = "positive" if _leads_away(guider) else "both"
        met: list[SteeringAttachment] = []
        added: list[SteeringAttachment] = []
        for duty in fitting:
            own = next((each for each in present if self._meets(each, duty, branch)), None)
            if own is not None:
                met.append(own)
            else:
                policy = self.policy.strictness(duty.steering.domains)
                added.append(PolicyAttachment(duty, guider.model_patcher, branch, policy, NAME))
        return met, added

    def _meets(self, own: SteeringAttachment, duty: Duty, branch: str) -> bool:
        assert self.policy is not None
        return (
            self.policy.is_met(duty, own.steering, own.calibrations())
            and own.branch in (branch, "both")
            and own.policy in ("block", self.policy.strictness(duty.steering.domains))
        )

    def _require_looked(self, attachments: list[SteeringAttachment]) -> None:
        """That every domain was looked at, in every picture that was painted."""
        for attachment in attachments:
            record = attachment.record_so_far()
            if record is None or not record.evaluations or attachment.policy != "block":
                continue
            found = [each for image in record.result["images"] for each in image.items()]
            missed = sorted({name for name, entry in found if not entry["looked"]})
            if missed:
                raise self._refusal(
                    f"the run has none of the noise levels at which its dictionary looks for "
                    f"{' and '.join(missed)}. Take more steps, or more of the schedule"
                )

    def _check_call(self, root: Any, module: torch.nn.Module, _: Any) -> None:
        """Before a module of a locked transformer is called. In a compiled graph the call of the whole is
        what was looked at."""
        if torch.compiler.is_compiling():
            return
        run: Run | None = getattr(_here, "run", None)
        if run is not None and run.permits(root, module):
            return
        why = "a node calls the model past the sampler run that is steered"
        error = NotSteered(self.fault) if self.policy is None else self._refusal(why)
        if run is None:
            self._tell(0, [], error)
        raise error

    def _refusal(self, why: str) -> NotSteered:
        return NotSteered(f"{NAME}: this run can't be steered, so it is refused: {why.rstrip('.')}.")

    def _tell(
        self, images: int, attachments: list[SteeringAttachment], error: BaseException | None = None
    ) -> None:
        """Writes a line of the audit log for each picture; one for what is refused before there is any."""
        if self._audit is None or self.policy is None:
            return
        now = executing()
        records = [record for each in attachments if (record := each.record_so_far()) is not None]
        known = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "policy": self.policy.sha256,
            "prompt_id": now.prompt_id,
            "node": now.node,
            "prompt_hash": keyed(signature(now.prompt, now.node), self.policy.key),
            "problems": list(dict.fromkeys(problem for record in records for problem in record.problems)),
            "reason": "" if error is None else str(error),
        }
        try:
            for image in range(max(images, 1)):
                domains: dict[str, Any] = {}
                for record in records:
                    found = record.result.get("images", [])
                    domains |= found[image] if image < len(found) else {}
                verdict = _verdict(domains, known["problems"]) if error is None else _outcome(error)
                self._audit.write(known | {"image": image, "verdict": verdict, "domains": domains})
        except OSError as fault:
            raise NotSteered(f"{NAME}: the audit log can't be written: {fault.strerror}.") from fault


def _parts(module: torch.nn.Module) -> list[torch.nn.Module]:
    """A module that is called itself; of a list of blocks, the blocks."""
    return [*module] if isinstance(module, torch.nn.ModuleList) else [module]


def _leads_away(guider: Any) -> bool:
    """Whether it is certain that guidance leads away from the negative prompt: it is ComfyUI's own, and not
    under 1."""
    from comfy.samplers import CFGGuider

    options = guider.model_options
    functions: list[Any] = []
    for name in _GUIDANCE_FUNCTIONS:
        given = options.get(name, [])
        functions += given if isinstance(given, list) else [given]
    for kind in _GUIDANCE_WRAPPERS:
        by_key = options.get("transformer_options", {}).get("wrappers", {}).get(kind, {})
        functions += [wrapper for of_key in by_key.values() for wrapper in of_key]
    foreign = [f for f in functions if not isinstance(getattr(f, "__self__", None), Attachment)]
    return type(guider).predict_noise is CFGGuider.predict_noise and guider.cfg >= 1 and not foreign


def _verdict(domains: dict[str, Any], problems: list[str]) -> str:
    if problems:
        return "not steered as planned"
    told = [f"{name} {found['status']}" for name, found in domains.items() if found["status"] != "clear"]
    return "; ".join(sorted(told)) or ("clear" if domains else "not steered")


def _outcome(error: BaseException) -> str:
    if isinstance(error, RiskFound):
        return "stopped"
    return "refused" if isinstance(error, NotSteered) else "failed"


IN_FORCE: Enforcement | None = None  # from ComfyUI's start to its end


def signed(receipt: dict[str, Any]) -> dict[str, Any]:
    """A receipt as it goes into a file, signed where there is a policy with a key."""
    return receipt if IN_FORCE is None else IN_FORCE.sign(receipt)


def enforce(path: Path) -> Enforcement:
    """Puts the policy file in force until ComfyUI ends. A file that can't be followed stops all sampling."""
    global IN_FORCE
    from comfy.model_base import BaseModel
    from comfy.samplers import CFGGuider

    try:
        policy = Policy(path)
        _require_apart(policy)
        enforcement = Enforcement(policy)
    except (ValueError, OSError) as error:
        fault = f"{NAME} can't be followed, so nothing is sampled. "
        log.error(f"{fault}{error}")
        enforcement = Enforcement(None, fault + str(error).replace(f"{path.parent}{os.sep}", ""))
    outer_sample, set_attribute = CFGGuider.outer_sample, BaseModel.__setattr__

    @functools.wraps(outer_sample)
    def sample(guider: Any, *args, **kwargs) -> Any:
        return enforcement.sample(outer_sample, guider, *args, **kwargs)

    def __setattr__(model: Any, name: str, value: Any) -> None:
        set_attribute(model, name, value)
        if name == "diffusion_model":
            enforcement.lock(model, value)

    CFGGuider.outer_sample, BaseModel.__setattr__ = sample, __setattr__
    IN_FORCE = enforcement
    return enforcement


def _require_apart(policy: Policy) -> None:
    """That no workflow can read or write the policy's files. Raises ValueError."""
    import folder_paths

    content = policy.content
    names = [content.signing_key, None if content.audit is None else content.audit.file]
    for path in [policy.path, *(policy.at(name) for name in names if name)]:
        for kind in ("output", "input", "temp", "user"):
            folder = Path(getattr(folder_paths, f"get_{kind}_directory")())
            if path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{path.name} is in the {kind} folder, which workflows reach: move it.")
