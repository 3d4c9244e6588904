"""The operator's policy: no run goes by it, in the stand-in and in the real ComfyUI."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safedig_core.dictionary.dictionary import Action
from safedig_core.signing import is_signed
from tests.nodes.conftest import pack_module
from tests.tiny import TINY, TINY_SD3, write_dictionary

enforcement = pack_module("nodes.bridge.enforcement")
steered = pack_module("nodes.bridge.steered")
attachment = pack_module("nodes.bridge.attachment")
steering_module = pack_module("safedig_core.steering.steering")
calibration_module = pack_module("safedig_core.steering.calibration")
Dictionary = pack_module("safedig_core.dictionary.dictionary").Dictionary
NotSteered, Steering = attachment.NotSteered, steering_module.Steering

BLOCK = {"flux": "double.1.img", "sd3": "joint.1.img"}
RISKY, NEGATIVE = 1, 99


@pytest.fixture
def family() -> str:
    """What differs between families is tested where taps are."""
    return "flux"


@pytest.fixture
def enforced(world: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Puts a policy for the tiny models in force; what is given stands in the file instead."""
    import comfy.model_base  # pyright: ignore[reportMissingImports]
    import comfy.samplers  # pyright: ignore[reportMissingImports]

    guider, base = comfy.samplers.CFGGuider, comfy.model_base.BaseModel
    plain = guider.outer_sample, base.__setattr__
    monkeypatch.setattr(guider, "outer_sample", guider.outer_sample)  # is put back afterwards
    monkeypatch.setattr(base, "__setattr__", base.__setattr__)
    monkeypatch.setattr(enforcement, "IN_FORCE", None)
    elsewhere = {
        f"get_{k}_directory": lambda: str(tmp_path / "comfyui") for k in ("output", "input", "temp", "user")
    }
    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace(**elsewhere))

    def enforce(text: str | None = None, **content: Any) -> Any:
        guider.outer_sample, base.__setattr__ = plain  # one policy at a time
        path = tmp_path / "policy.json"
        usual = {"format": 1, "dictionaries": [required(tmp_path)]}
        path.write_text(json.dumps(usual | content) if text is None else text)
        return enforcement.enforce(path)

    return enforce


def required(folder: Path, name: str = "flux", **written: Any) -> dict[str, str]:
    """A dictionary that finds something in everything, as a policy names it."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        architecture = TINY if name.startswith("flux") else TINY_SD3
        plan = [Action(BLOCK["flux" if architecture is TINY else "sd3"], "repel", "residual", 1.0)]
        write_dictionary(path, plan, architecture=architecture, **written)
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def own(tmp_path: Path, name: str = "flux", **options: Any) -> Any:
    """A steering as a workflow's Apply makes it."""
    required(tmp_path, name)
    return Steering(Dictionary.open(tmp_path / f"{name}.safetensors"), **options)


def sample(world: Any, model: Any, **options: Any) -> torch.Tensor:
    return world.sample(model, [world.prompt(RISKY)], [world.prompt(NEGATIVE)], **options)


@pytest.fixture
def pictures(world: Any, tmp_path: Path) -> SimpleNamespace:
    """Of runs without a policy: by no steering, and by Apply with the policy's dictionary."""
    model = world.model("flux")
    once, _ = steered.attach(model, own(tmp_path))
    both, _ = steered.attach(model, own(tmp_path), branch="both")
    twice, _ = steered.attach(model, own(tmp_path, strength=2.0))
    found = SimpleNamespace(
        plain=sample(world, model),
        once=sample(world, once),
        both=sample(world, both),
        twice=sample(world, twice),
    )
    assert not torch.equal(found.plain, found.once) and not torch.equal(found.once, found.both)
    return found


# What is steered.


def test_a_model_without_our_nodes_is_steered_as_with_apply(
    world: Any, enforced: Any, pictures: SimpleNamespace
) -> None:
    enforced()
    assert torch.equal(sample(world, world.model("flux")), pictures.once)


def test_a_policy_strength_multiplies_the_plan(world: Any, enforced: Any, pictures: SimpleNamespace) -> None:
    enforced(domains={"weapons": {"strength": 2.0}})
    assert torch.equal(sample(world, world.model("flux")), pictures.twice)


WEAKER = {
    "strength 0": {"strength": 0.0},
    "observe": {"modes": {"weapons": "observe"}},
    "no plan": {"plan": []},
}


@pytest.mark.parametrize("options", WEAKER.values(), ids=WEAKER)
def test_a_weaker_apply_of_the_workflow_changes_nothing(
    world: Any, enforced: Any, pictures: SimpleNamespace, tmp_path: Path, options: dict
) -> None:
    enforced()
    model, _ = steered.attach(world.model("flux"), own(tmp_path, **options), policy="off")
    assert torch.equal(sample(world, model), pictures.once)


def test_an_apply_that_does_as_much_is_enough(
    world: Any, enforced: Any, pictures: SimpleNamespace, tmp_path: Path
) -> None:
    enforced()
    model, receipt = steered.attach(world.model("flux"), own(tmp_path))
    assert torch.equal(sample(world, model), pictures.once)
    assert receipt.last.result["images"][0]["weapons"]["status"] == "steered"


def test_an_apply_under_another_policy_is_not_enough(
    world: Any, enforced: Any, pictures: SimpleNamespace, tmp_path: Path
) -> None:
    enforced()
    model, _ = steered.attach(world.model("flux"), own(tmp_path), policy="warn")
    out = sample(world, model)
    assert not torch.equal(out, pictures.once) and not torch.equal(out, pictures.plain)


def test_guidance_under_1_steers_both_prompts(world: Any, enforced: Any, tmp_path: Path) -> None:
    both, _ = steered.attach(world.model("flux"), own(tmp_path), branch="both")
    wanted = [sample(world, both, cfg=cfg) for cfg in (0.0, 0.5)]
    enforced()
    for cfg, picture in zip((0.0, 0.5), wanted, strict=True):
        assert torch.equal(sample(world, world.model("flux"), cfg=cfg), picture)


def test_a_function_after_guidance_steers_both_prompts(
    world: Any, enforced: Any, pictures: SimpleNamespace
) -> None:
    """It may paint the negative prompt, whatever the scale."""
    enforced()
    model = world.model("flux")
    model.model_options["sampler_post_cfg_function"] = [lambda args: args["denoised"]]
    assert torch.equal(sample(world, model), pictures.both)


def test_a_domain_that_is_set_to_stop_stops(world: Any, enforced: Any, tmp_path: Path) -> None:
    enforced(domains={"weapons": {"action": "stop"}}, audit={"file": "audit.jsonl"})
    with pytest.raises(steering_module.RiskFound):
        sample(world, world.model("flux"))
    (line,) = lines(tmp_path)
    assert line["verdict"] == "stopped"


def test_calibrations_beside_the_dictionary_count_only_where_the_policy_names_them(
    world: Any, enforced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that anybody can write there could keep the gate shut."""
    path = tmp_path / "flux.safetensors"
    plan = [Action(BLOCK["flux"], "repel", "residual", 1.0)]
    open_at_3 = write_dictionary(path, plan, threshold=1e-3)
    threshold = {"sha256": open_at_3.sha256, "threshold": 2e-3, "forms": {"other": [0, 20]}}
    text = {"format": 1, "variant": {"model": "x"}, "domains": {"weapons": threshold}, "prompts_sha256": ""}
    file = tmp_path / "flux.0123456789ab.calibration.json"
    file.write_text(json.dumps(text))
    monkeypatch.setattr(steered, "_difference", lambda variant, **given: "")
    named = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    for allowed, limit in (([], 1e-3), ([named], 2e-3)):
        audit = {"file": f"{limit}.jsonl"}
        enforced(dictionaries=[required(tmp_path) | {"calibrations": allowed}], audit=audit)
        sample(world, world.model("flux"))
        assert lines(tmp_path, f"{limit}.jsonl")[-1]["domains"]["weapons"]["threshold"] == limit
        policy = enforcement.IN_FORCE.policy
        beside = calibration_module.beside(own(tmp_path).dictionary)  # what a workflow's Apply chooses from
        assert policy.is_met(policy.duties[0], own(tmp_path), beside) == bool(allowed)


# What is refused.


def test_a_model_that_no_dictionary_is_for_is_refused(world: Any, enforced: Any) -> None:
    enforced()
    with pytest.raises(NotSteered, match="no dictionary is made for it"):
        sample(world, world.model("sd3"))


def test_a_model_that_can_not_be_steered_is_refused(world: Any, enforced: Any) -> None:
    enforced()
    model = world.model("flux")
    transformer = model.model.diffusion_model
    transformer.__class__ = type("UNetModel", (type(transformer),), {})
    with pytest.raises(NotSteered, match="UNetModel.* can't be steered"):
        sample(world, model)


def test_a_model_that_lacks_a_required_domain_is_refused(world: Any, enforced: Any, tmp_path: Path) -> None:
    both = [required(tmp_path), required(tmp_path, "sd3", domains=("shock",))]
    enforced(dictionaries=both, domains={"weapons": {}, "shock": {}})
    with pytest.raises(NotSteered, match="no dictionary knows shock in it"):
        sample(world, world.model("flux"))


def test_an_exempt_model_runs_as_it_is(world: Any, enforced: Any, pictures: SimpleNamespace) -> None:
    enforced(exempt_models=[type(world.model("flux").model).__name__])
    assert torch.equal(sample(world, world.model("flux")), pictures.plain)


def test_noise_levels_that_no_gate_looks_at_are_refused(world: Any, enforced: Any, tmp_path: Path) -> None:
    late = [required(tmp_path, "flux-late", gate_window=(0.2, 0.1))]
    enforced(dictionaries=late)
    with pytest.raises(
        NotSteered, match="none of the noise levels at which its dictionary looks for weapons"
    ):
        sample(world, world.model("flux"))
    enforced(dictionaries=late, domains={"weapons": {"policy": "warn"}})
    sample(world, world.model("flux"))


def test_what_reads_activations_is_refused(world: Any, enforced: Any) -> None:
    class Tap:
        positions = (BLOCK["flux"],)

    enforced()
    model, _ = attachment.attach_tap(world.model("flux"), Tap(), "Capture")
    with pytest.raises(NotSteered, match="steered activations would be captured"):
        sample(world, model)


def test_a_model_that_is_called_without_a_sampler_is_refused(world: Any, enforced: Any) -> None:
    enforced()
    model = world.model("flux").model
    x, t = torch.zeros(1, 16, 8, 8), torch.ones(1)
    with pytest.raises(NotSteered, match="past the sampler run"):
        model.apply_model(x, t, None, torch.zeros(1, 6, 16), None, {}, y=torch.zeros(1, 8))
    with pytest.raises(NotSteered, match="past the sampler run"):
        model.diffusion_model(x, t)
    with pytest.raises(NotSteered, match="past the sampler run"):
        model.diffusion_model.double_blocks[1](x, x, t)


def test_a_second_pass_within_a_pass_is_refused(world: Any, enforced: Any) -> None:
    """What is given back would be that of the second, which nothing steered."""
    enforced()
    model = world.model("flux")

    def twice(executor: Any, *args: Any, **kwargs: Any) -> Any:
        executor(*args, **kwargs)
        plain = [{**a, "patches_replace": {}} if isinstance(a, dict) and "wrappers" in a else a for a in args]
        given = {
            k: {**v, "patches_replace": {}} if k == "transformer_options" else v for k, v in kwargs.items()
        }
        return executor(*plain, **given)

    model.add_wrapper_with_key("diffusion_model", "another", twice)
    with pytest.raises(NotSteered, match="past the sampler run|not reached"):
        sample(world, model)


def test_another_model_within_a_run_is_refused(world: Any, enforced: Any) -> None:
    enforced()
    model, other = (
        world.model("flux"),
        world.model("flux", seed=6) if world.name == "ComfyUI" else world.model("flux"),
    )
    x, t = torch.zeros(1, 16, 8, 8), torch.ones(1)

    def instead(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return other.model.apply_model(x, t, None, torch.zeros(1, 6, 16), None, {}, y=torch.zeros(1, 8))

    model.add_wrapper_with_key("apply_model", "another", instead)
    with pytest.raises(NotSteered):
        sample(world, model)


# A policy that can't be followed.


ZEROS = "0" * 64
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no JSON": ({"text": "{"}, "is not JSON"),
    "another format": ({"format": 2}, "its format is 2"),
    "an unknown key": ({"dictionary": "flux.safetensors"}, "unexpected 'dictionary'"),
    "no such dictionary": ({"dictionaries": [{"file": "none", "sha256": ZEROS}]}, "No such file"),
    "another dictionary": ({"dictionaries": [{"file": "short", "sha256": ZEROS}]}, "has the SHA-256"),
    "a domain that nothing knows": (
        {"domains": {"shock": {}}},
        "no dictionary of it knows the domain 'shock'",
    ),
    "no such action": ({"domains": {"weapons": {"action": "ignore"}}}, "an action must be one of"),
    "a strength of 0": ({"domains": {"weapons": {"strength": 0}}}, "a strength must be over 0"),
    "policy off": ({"domains": {"weapons": {"policy": "off"}}}, "a domain's policy must be"),
    "no such key": ({"signing_key": "none"}, "No such file"),
    "a short key": ({"signing_key": "short"}, "shorter than 32 bytes"),
    "a key that workflows reach": ({"signing_key": "comfyui/key"}, "which workflows reach"),
    "no place for the log": ({"audit": {"file": "none/audit.jsonl"}}, "No such file"),
}


@pytest.mark.parametrize(("content", "why"), BROKEN.values(), ids=BROKEN)
def test_nothing_is_sampled_under_a_broken_policy(
    world: Any, enforced: Any, tmp_path: Path, content: dict, why: str
) -> None:
    (tmp_path / "short").write_bytes(b"x" * 31)
    (tmp_path / "comfyui").mkdir()
    (tmp_path / "comfyui" / "key").write_bytes(b"x" * 32)
    found = enforced(**content)
    assert found.status() == {"policy": "broken", "samples": False}
    with pytest.raises(NotSteered) as error:
        sample(world, world.model("flux"))
    assert "can't be followed, so nothing is sampled" in str(error.value) and why in str(error.value)
    assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(NotSteered, match="nothing is sampled"):
        world.model("flux").model.diffusion_model(torch.zeros(1, 16, 8, 8), torch.ones(1))


# The audit log, and signatures.


def lines(folder: Path, name: str = "audit.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_audit_log_has_a_line_for_each_picture(world: Any, enforced: Any, tmp_path: Path) -> None:
    policy = enforced(audit={"file": "audit.jsonl"}).policy
    sample(world, world.model("flux"), images=2)
    with pytest.raises(NotSteered):
        sample(world, world.model("sd3"))
    with pytest.raises(NotSteered):
        world.model("flux").model.diffusion_model(torch.zeros(1, 16, 8, 8), torch.ones(1))
    first, second, refused, past = lines(tmp_path)
    assert (first["image"], second["image"]) == (0, 1)
    assert first["verdict"] == second["verdict"] == "weapons steered"
    assert first["domains"]["weapons"]["evidence"] > 0 and first["policy"] == policy.sha256
    assert len(first["prompt_hash"]) == 64
    assert refused["verdict"] == past["verdict"] == "refused" and "no dictionary" in refused["reason"]


def test_a_picture_without_its_line_is_refused(
    world: Any, enforced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = enforced(audit={"file": "audit.jsonl"})

    def full(_: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(found._audit.stream, "write", full)
    with pytest.raises(NotSteered, match="the audit log can't be written: No space left on device"):
        sample(world, world.model("flux"))


def test_the_audit_log_is_rotated(tmp_path: Path) -> None:
    log = pack_module("nodes.bridge.audit").AuditLog(tmp_path / "audit.jsonl", 1, 2)
    for i in range(8):
        log.write({"i": i, "text": "x" * (400 << 10)})
    log.close()
    kept = {path.name: [json.loads(line)["i"] for line in path.read_text().splitlines()]
            for path in tmp_path.iterdir()}  # fmt: skip
    assert kept == {"audit.jsonl": [6, 7], "audit.jsonl.1": [4, 5], "audit.jsonl.2": [2, 3]}


def test_receipts_are_signed_with_the_policys_key(world: Any, enforced: Any, tmp_path: Path) -> None:
    key = b"k" * 32
    (tmp_path / "key").write_bytes(key)
    receipt = {"verdict": "clear", "pictures": [{"sha256": "0" * 64}]}
    assert enforcement.signed(receipt) == receipt
    policy = enforced(signing_key="key").policy
    found = enforcement.signed(receipt)
    assert is_signed(found, key) and not is_signed(found, b"l" * 32)
    assert not is_signed({**found, "verdict": "weapons steered"}, key)
    assert found["operator_policy"] == policy.sha256


def test_a_policy_without_dictionaries_only_signs(
    world: Any, enforced: Any, pictures: SimpleNamespace
) -> None:
    enforced(dictionaries=[])
    assert torch.equal(sample(world, world.model("flux")), pictures.plain)
