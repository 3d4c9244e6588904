"""Sees for itself what a diffusion model's blocks are given: forward hooks on its own modules.

The tests compare it with receipts, so nothing here knows of SafeDIG. A pass is one forward pass of
the model. Its rows go by the pooled vector of their prompt, which nothing in a graph changes unseen; where
the model takes none, by the first token that isn't padding.
A position is reached in a pass where what follows its block was called; a row is moved there where
what follows got other numbers than the block gave.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

NAMES: dict[str, str] = {}  # of prompts, by the fingerprint of their pooled vector, and of their first token
PASSES: dict[str, dict[str, list[Pass]]] = {}  # by prompt_id and node_id
KEPT = 50  # prompts


@dataclass
class Pass:
    rows: list[str]  # names of the prompts; of a vector without a name, its fingerprint
    index: int  # of the call of the node, where it is called once for each entry of a list
    reached: dict[str, list[bool] | None] = field(default_factory=dict)  # which rows were moved there


def fingerprint(vector: Tensor) -> str:
    """The same in every precision down to bfloat16."""
    rounded = vector.detach().bfloat16().float().cpu()
    return hashlib.sha256(rounded.numpy().tobytes()).hexdigest()[:12]


def name(conditioning: list, called: str) -> None:
    """Lets the rows of a conditioning be known by a name."""
    for sequence, extra in conditioning:
        NAMES[fingerprint(extra["pooled_output"][0])] = called
        NAMES[fingerprint(first_token(sequence[0]))] = called


def first_token(sequence: Tensor) -> Tensor:
    """Of [T, d], the first one that isn't zero; a zero where all are."""
    return next((token for token in sequence if token.any()), sequence[0])


def observe(module: Any) -> None:
    """Records every forward pass of a FLUX, a Chroma or an SD3 from now on."""
    if not hasattr(module, "safedig_tests_observer"):
        module.safedig_tests_observer = Flux(module) if hasattr(module, "double_blocks") else SD3(module)


class Observer:
    """What both families share. Threads that run one model are kept apart."""

    def __init__(self, module: Any, stages: dict[str, Any], pooled: Any, text: Any):
        """`stages`: the blocks by the name of their positions, in order, and the final layer."""
        self.here = threading.local()
        if pooled is None:
            text.register_forward_pre_hook(lambda _, args: self.begin_with(map(first_token, args[0])))
        else:
            pooled.register_forward_pre_hook(lambda _, args: self.begin_with(args[0]))
        text.register_forward_pre_hook(self.see_text)
        self.names = list(stages)
        for at, stage in stages.items():
            stage.register_forward_pre_hook(self.before(at), with_kwargs=True)
            if at != "final":
                stage.register_forward_hook(self.after(at))

    def entering(self, args: tuple, given: dict) -> dict[str, Tensor]:
        """What enters a block, by stream."""
        raise NotImplementedError

    def leaving(self, out: Any) -> dict[str, Tensor]:
        """What a block gives, by stream."""
        raise NotImplementedError

    def begin_with(self, vectors: Iterable[Tensor]) -> None:
        """A pass, of rows with these vectors."""
        self.here.out, self.here.last = {}, 0
        self.here.now = _new_pass([NAMES.get(found := fingerprint(row), found) for row in vectors])

    def see_text(self, _: Any, args: tuple) -> None:
        self.here.text = args[0].shape[1]
        self.here.now.reached["text"] = None

    def before(self, stage: str) -> Any:
        def hook(_: Any, args: tuple, given: dict) -> None:
            here, at = self.here, self.names.index(stage)
            streams = {"img": args[0]} if stage == "final" else self.entering(args, given)
            for earlier in self.names[here.last : at]:  # more than one where blocks were left out
                for stream in ("img", "txt"):
                    gave, got = here.out.get(f"{earlier}.{stream}"), streams.get(stream)
                    known = gave is not None and got is not None and gave.shape == got.shape
                    moved = (gave != got).flatten(1).any(1).tolist() if known else None
                    here.now.reached[f"{earlier}.{stream}"] = moved
            here.last = at

        return hook

    def after(self, stage: str) -> Any:
        def hook(_: Any, args: tuple, out: Any) -> None:
            gave = {f"{stage}.{stream}": tensor.clone() for stream, tensor in self.leaving(out).items()}
            self.here.out |= gave

        return hook


class Flux(Observer):
    def __init__(self, module: Any):
        stages = {f"double.{i}": block for i, block in enumerate(module.double_blocks)}
        stages |= {f"single.{i}": block for i, block in enumerate(module.single_blocks)}
        vector = getattr(module, "vector_in", None)
        super().__init__(module, stages | {"final": module.final_layer}, vector, module.txt_in)

    def entering(self, args: tuple, given: dict) -> dict[str, Tensor]:
        return {"img": given["img"], "txt": given["txt"]} if "txt" in given else self.split(args[0])

    def leaving(self, out: Any) -> dict[str, Tensor]:
        return {"img": out[0], "txt": out[1]} if isinstance(out, tuple) else self.split(out)

    def split(self, sequence: Tensor) -> dict[str, Tensor]:
        return {"txt": sequence[:, : self.here.text], "img": sequence[:, self.here.text :]}


class SD3(Observer):
    def __init__(self, module: Any):
        stages = {f"joint.{i}": block for i, block in enumerate(module.joint_blocks)}
        text = module.context_embedder
        super().__init__(module, stages | {"final": module.final_layer}, module.y_embedder, text)

    def entering(self, args: tuple, given: dict) -> dict[str, Tensor]:
        return {"txt": args[0], "img": args[1]}

    def leaving(self, out: Any) -> dict[str, Tensor]:
        text, image = out
        return {"img": image} if text is None else {"img": image, "txt": text}


def _new_pass(rows: list[str]) -> Pass:
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    prompt, node, index = ("", "", 0) if context is None else context
    new = Pass(rows, index or 0)
    PASSES.setdefault(prompt, {}).setdefault(node, []).append(new)
    while len(PASSES) > KEPT:
        del PASSES[next(iter(PASSES))]
    return new


def serve() -> None:
    """Lets the test process ask: GET /safedig_tests/observed/<prompt_id>."""
    from aiohttp import web
    from server import PromptServer  # pyright: ignore[reportAttributeAccessIssue]

    @PromptServer.instance.routes.get("/safedig_tests/observed/{prompt}")
    async def observed(request: web.Request) -> web.Response:
        nodes = PASSES.get(request.match_info["prompt"], {})
        return web.json_response({node: [vars(each) for each in passes] for node, passes in nodes.items()})
