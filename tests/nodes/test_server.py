"""Whole graphs through the HTTP API of a real ComfyUI, with tiny random models."""

from __future__ import annotations

import json
import os
import re
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from safetensors.torch import load_file, save

from tests.nodes.server import Server

POSITION = {"flux": "double.1.img", "sd3": "joint.1.img"}


def graph(
    family: str = "flux",
    *,
    apply: bool = True,
    between: dict | None = None,
    positions: dict | None = None,
    images: int = 2,
    **extra: Any,
) -> dict[str, dict]:
    """A sampling run; `between` is a node that takes the steered model and gives it on."""

    def node(kind: str, **given: Any) -> dict:
        return {"class_type": kind, "inputs": given}

    nodes = {
        "model": node("TestTinyModel", family=family),
        "positive": node("TestTinyPrompt", seed=1),
        "negative": node("TestTinyPrompt", seed=99),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=images),
        "save": node("SaveLatent", samples=["sampler", 0], filename_prefix="out"),
    }
    model = ["model", 0]
    if apply:
        file = extra.pop("dictionary", f"{family}.safetensors")
        nodes["dictionary"] = node("SafeDIGLoadDictionary", dictionary=file)
        given = {
            "strength": 1.0, "action": "steer", "action_per_domain": "", "policy": "block",
            "branch": "positive", "gate": True, "preserve_norm": False,
        }  # fmt: skip
        given |= {"model": model, "dictionary": ["dictionary", 0]} | extra
        if positions is not None:
            chosen = {
                "select": "routed", "positions": "", "operator": "as planned", "form": "residual",
                "strength": 1.0, "window_start": 1.0, "window_end": 0.0,
            }  # fmt: skip
            nodes["select"] = node(
                "SafeDIGSelectPositions", **(chosen | {"dictionary": ["dictionary", 0]} | positions)
            )
            given["positions"] = ["select", 0]
        nodes["apply"] = node("SafeDIGApplySteering", **given)
        nodes["picture"] = node("TestLatentPicture", latent=["sampler", 0])
        nodes["receipt"] = node("SafeDIGSteeringReceipt", images=["picture", 0], receipt=["apply", 1])
        nodes["saved"] = node("SaveImage", images=["receipt", 0], filename_prefix="out")
        model = ["apply", 0]
    if between is not None:
        nodes["between"] = {**between, "inputs": between["inputs"] | {"model": model}}
        model = ["between", 0]
    nodes["sampler"] = node(
        "KSampler", model=model, positive=["positive", 0], negative=["negative", 0],
        latent_image=["latent", 0], seed=3, steps=6, cfg=2.0, sampler_name="euler", scheduler="simple",
        denoise=1.0,
    )  # fmt: skip
    return nodes


def latent(server: Server, result: Any) -> torch.Tensor:
    assert result.error is None, result.error
    return load_file(server.file(result.outputs["save"]["latents"][0]))["latent_tensor"]


def receipt(result: Any) -> dict:
    assert result.error is None, result.error
    return json.loads(result.outputs["receipt"]["safedig_receipt"][0])


@pytest.fixture(params=["flux", "sd3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_importing_the_pack_is_quick(server: Server) -> None:
    (seconds,) = re.findall(r"([0-9.]+) seconds: \S+/ComfyUI-SafeDIG-main", server.log.read_text())
    assert float(seconds) < 0.3


def test_steering_changes_the_picture_and_says_so(server: Server, family: str) -> None:
    plain = latent(server, server.run(graph(family, apply=False)))
    result = server.run(graph(family), {"extra_pnginfo": {}})
    assert not torch.equal(latent(server, result), plain)
    report = receipt(result)
    assert report["as_planned"] and report["verdict"] == "weapons steered"
    (run,) = report["runs"]
    assert run["calls"] == [[1] * 6] and run["sampler_node"] == "sampler"
    assert run["positions"] == [POSITION[family]] and len(run["images"]) == 2
    text = result.outputs["receipt"]["text"][0]
    assert text.startswith("Verdict: weapons steered") and f"{POSITION[family]}: 6 of 6 calls" in text
    (view,) = map(json.loads, result.outputs["receipt"]["safedig_view"])
    assert server.file(view["heat"][0]).is_file()

    from PIL import Image

    with Image.open(server.file(result.outputs["saved"]["images"][0])) as picture:
        (said,) = json.loads(picture.info["safedig"])["receipt"]
        assert said | {"runs": report["runs"]} == report
        named = ("sampler_node", "steps", "evaluations", "problems", "calibration", "checkpoint")
        assert said["runs"] == [{k: run[k] for k in named}]


def test_strength_zero_is_as_if_the_node_were_not_there(server: Server, family: str) -> None:
    plain = latent(server, server.run(graph(family, apply=False)))
    result = server.run(graph(family, strength=0.0))
    assert torch.equal(latent(server, result), plain)
    assert receipt(result)["runs"][0]["tokens_moved"] == [[[0, 0]] * 6]
    assert receipt(result)["verdict"] == "weapons found, nothing moved"


def test_what_is_left_out_of_the_plan_is_left_alone(server: Server) -> None:
    steered = latent(server, server.run(graph()))
    assert torch.equal(latent(server, server.run(graph(positions={}))), steered)
    by_hand = {"select": "by hand", "positions": "double.1.img", "operator": "repel", "strength": 1.0}
    assert torch.equal(latent(server, server.run(graph(positions=by_hand))), steered)
    assert not torch.equal(latent(server, server.run(graph(positions=by_hand | {"strength": 0.2}))), steered)


EASYCACHE = {
    "class_type": "EasyCache",
    "inputs": {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False},
}


@pytest.mark.parametrize(
    ("between", "cause"),
    [
        ({"class_type": "TestOverwrite", "inputs": {}}, r"double\.1\.img not reached.*a_later_node"),
        (EASYCACHE, r"double\.1\.img not reached.*easycache"),
        ({**EASYCACHE, "class_type": "LazyCache"}, r"skipped.*lazycache"),
    ],
    ids=["overwritten", "EasyCache", "LazyCache"],
)
def test_what_gets_in_the_way_is_an_error_or_a_warning(server: Server, between: dict, cause: str) -> None:
    one = {"between": between, "images": 1}  # EasyCache of 0.3.64 fails on larger batches by itself
    refused = server.run(graph(**one))
    assert re.search(
        rf"^Apply Blend/Repel Steering \(node apply\): .*{cause}.*policy to 'warn'", refused.message
    )
    assert refused.error and refused.error["node_id"] == "sampler"
    warned = server.run(graph(**one, policy="warn"))
    report = receipt(warned)
    assert not report["as_planned"] and report["verdict"] == "not steered as planned"
    assert "PROBLEM: " in warned.outputs["receipt"]["text"][0]
    assert "is not steered as planned" in server.log.read_text()
    assert receipt(server.run(graph(**one, policy="off")))["runs"][0]["problems"]


def test_guidance_by_skipped_layers(server: Server, family: str) -> None:
    """Core's skip-layer guidance runs a pass of its own without some blocks."""
    skip = {
        "class_type": "SkipLayerGuidanceDiT",
        "inputs": {
            "double_layers": "1", "single_layers": "", "scale": 2.0, "start_percent": 0.0, "end_percent": 1.0,
            "rescaling_scale": 0.0,
        },
    }  # fmt: skip
    with_both = server.run(graph(family, between=skip))
    assert receipt(with_both)["as_planned"]
    alone = server.run(graph(family, apply=False, between=skip))
    assert not torch.equal(latent(server, with_both), latent(server, alone))
    idle = server.run(graph(family, between=skip, strength=0.0))
    assert torch.equal(latent(server, idle), latent(server, alone))


def test_stop_ends_the_run_with_its_reason(server: Server, family: str) -> None:
    result = server.run(graph(family, action="observe", action_per_domain="weapons=stop"))
    assert re.search(r"stopped: weapons found in picture 1, 2 of the batch at step 1 ", result.message)
    observed = server.run(graph(family, action="observe"))
    assert receipt(observed)["verdict"] == "weapons observed"


def test_a_model_that_is_not_sampled_is_noticed(server: Server) -> None:
    nodes = graph()
    nodes["sampler"]["inputs"]["model"] = ["model", 0]
    assert "was not steered by it: node sampler (KSampler)" in server.run(nodes).message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dictionary": "sd3.safetensors"}, r"made for a sd3 model .* doesn't fit this flux model"),
        ({"dictionary": "cut.safetensors"}, r"cut\.safetensors: "),
        ({"action_per_domain": "knitting=stop"}, r"'knitting=stop' .* a domain among weapons"),
        ({"positions": {"select": "by hand", "positions": "double.7.img"}}, r"nothing at double\.7\.img"),
        ({"positions": {"select": "by hand", "positions": "../../etc"}}, r"'../../etc' is not a position"),
        ({"positions": {"select": "by hand"}}, r"names no position"),
        ({"positions": {"select": "text"}}, r"no position in the group 'text'"),
        (
            {"positions": {"operator": "repel", "window_start": 0.1, "window_end": 0.9}},
            r"window must run down",
        ),
    ],
)
def test_bad_input_is_told_in_words(server: Server, change: dict, expected: str) -> None:
    message = server.run(graph(**change)).message
    assert re.search(expected, message) and str(server.base) not in message
    assert receipt(server.run(graph()))["as_planned"]


@pytest.mark.parametrize(
    "change",
    [{"strength": 1e9}, {"strength": -1.0}, {"strength": "a lot"}],
    ids=str,
)
def test_numbers_out_of_range_are_refused_before_it_runs(server: Server, change: dict) -> None:
    status, answer = server.queue(graph(**change))
    assert status == 400 and answer["node_errors"]
    assert receipt(server.run(graph()))["as_planned"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dictionary": "missing.safetensors"}, "There is no dictionary 'missing.safetensors'"),
        ({"dictionary": "../../server.log"}, "There is no dictionary '../../server.log'"),
        ({"policy": "none"}, "'none' is not one of block, warn, off"),
        ({"action": "dance"}, "unknown mode 'dance'"),
    ],
)
def test_choices_that_are_not_there_are_refused(server: Server, change: dict, expected: str) -> None:
    """By ComfyUI before it runs, or, where its version doesn't check these, by the node."""
    status, answer = server.queue(graph(**change))
    if status == 400:
        found = json.dumps(answer["node_errors"])
        assert expected in found or "not in" in found
    else:
        assert status == 200
        assert expected in server.run(graph(**change)).message
    assert receipt(server.run(graph()))["as_planned"]


def test_odd_entries_of_the_folder_cost_nobody_else(server: Server) -> None:
    """Links, pipes and a file that is cut short in models/safedig, while ComfyUI runs."""
    folder = server.base / "models" / "safedig"
    try:
        (folder / "dangling.safetensors").symlink_to(folder / "nowhere")
        (folder / "outside.safetensors").symlink_to(server.log)
        os.mkfifo(folder / "pipe.safetensors")
        os.mkfifo(folder / "pipe.json")
        lines = server.get("/safedig/list")
        names = {line["name"] for line in lines}
        assert {"flux.safetensors", "cut.safetensors"} <= names and len(names) == len(lines)
        assert not names & {"dangling.safetensors", "outside.safetensors", "pipe.safetensors"}
        (node,) = server.get("/object_info/SafeDIGLoadDictionary").values()
        assert "pipe.safetensors" not in json.dumps(node) and "flux.safetensors" in json.dumps(node)
        for name in ("cut", "dangling", "outside", "pipe", "../../server"):
            told = server.get(f"/safedig/card?dictionary={name}.safetensors")["error"]
            assert str(server.base) not in told and f"{name}.safetensors" in told
        refused = json.dumps(server.queue(graph(dictionary="pipe.safetensors"))[1])
        assert "There is no dictionary 'pipe.safetensors'" in refused
        assert server.get("/safedig/card?dictionary=flux.safetensors")["domains"] == ["weapons"]
    finally:
        for name in ("dangling.safetensors", "outside.safetensors", "pipe.safetensors", "pipe.json"):
            (folder / name).unlink(missing_ok=True)


def test_a_broken_checkpoint_is_told_in_words(server: Server) -> None:
    folder = server.base / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    whole = save({"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(4)})
    for name, content in (("cut", whole[:-3]), ("text", b"<html>"), ("empty", b""), ("odd", whole)):
        (folder / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(HTTPError) as refused:
            server.get(f"/safedig/model?folder=checkpoints&file={name}.safetensors")
        assert refused.value.code == 422
        told = json.loads(refused.value.read())["error"]
        assert told.startswith(
            f"{name}.safetensors: its tensors" if name == "odd" else f"{name}.safetensors: it is"
        )
    assert server.get("/safedig/model?folder=checkpoints&file=none.safetensors") == {"model": ""}


def test_no_number_at_all_is_refused(server: Server) -> None:
    assert "The strength is nan" in server.run(graph(strength=float("nan"))).message
