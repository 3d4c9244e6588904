"""Nodes for the tests against a running ComfyUI: tiny random models, an observer, and nodes that get in
the way as those of other packs do."""

# pyright: reportMissingImports=false
from __future__ import annotations

import contextvars
import importlib.util
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import ComfyExtension, io
from torch import Tensor

from . import observer

HERE = Path(__file__).resolve().parent
NODES: list[type[io.ComfyNode]] = []
SAMPLING = [
    io.Model.Input("model"), io.Conditioning.Input("positive"), io.Conditioning.Input("negative"),
    io.Latent.Input("latent"), io.Int.Input("seed"),
]  # fmt: skip
STEPS = 4


def node(inputs: list, outputs: list, anew: bool = False, **schema: Any) -> Callable[[Callable], Callable]:
    """Makes a node, Test<Name>, of a function; a result that is no NodeOutput is its one output. With `anew`,
    it is executed for every prompt."""

    def made(function: Callable) -> Callable:
        name = "Test" + function.__name__.title().replace("_", "")

        def define_schema(cls: Any) -> io.Schema:
            return io.Schema(node_id=name, inputs=inputs, outputs=outputs, **schema)

        def execute(cls: Any, **given: Any) -> io.NodeOutput:
            out = function(**given)
            return out if isinstance(out, io.NodeOutput) else io.NodeOutput(out)

        methods: dict[str, Any] = {
            "define_schema": classmethod(define_schema),
            "execute": classmethod(execute),
        }
        if anew:
            methods["fingerprint_inputs"] = classmethod(lambda cls, **given: float("nan"))
        NODES.append(type(name, (io.ComfyNode,), methods))
        return function

    return made


def _world() -> Any:
    spec = importlib.util.spec_from_file_location("safedig_tests_real", HERE.parent / "real.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.World(None)


# What graphs are made of.


@node(
    [
        io.Combo.Input("family", options=["flux", "sd3", "chroma", "flux2"]),
        io.Int.Input("seed", default=5, optional=True),
        io.Combo.Input("dtype", options=["float32", "bfloat16"], optional=True),
    ],
    [io.Model.Output()],
)
def tiny_model(family: str, seed: int = 5, dtype: str = "float32") -> Any:
    return _world().model(family, getattr(torch, dtype), seed)


@node([io.Int.Input("seed")], [io.Conditioning.Output()])
def tiny_prompt(seed: int) -> Any:
    prompt = [_world().prompt(seed)]
    observer.name(prompt, str(seed))
    return prompt


@node([io.Conditioning.Input("conditioning"), io.String.Input("called")], [io.Conditioning.Output()])
def named(conditioning: Any, called: str) -> Any:
    observer.name(conditioning, called)
    return conditioning


@node([io.Conditioning.Input("first"), io.Conditioning.Input("second")],
      [io.Conditioning.Output(is_output_list=True)])  # fmt: skip
def prompt_list(first: Any, second: Any) -> Any:
    return [first, second]


@node([io.Model.Input("first"), io.Model.Input("second")], [io.Model.Output(is_output_list=True)])
def model_list(first: Any, second: Any) -> Any:
    return [first, second]


TURNS: dict[str, int] = {}


@node(
    [io.Model.Input("first"), io.Model.Input("second"), io.String.Input("run")],
    [io.Model.Output()],
    anew=True,
)
def takes_turns(first: Any, second: Any, run: str) -> Any:
    """A switch that nothing in the graph decides: the first model, the second, the first ..."""
    TURNS[run] = TURNS.get(run, 0) + 1
    return first if TURNS[run] % 2 else second


@node([io.Image.Input("images")], [io.Image.Output()], is_input_list=True)
def pictures_of_a_list(images: list[Tensor]) -> Any:
    """One batch of all pictures of a list."""
    return torch.cat(images)


@node([io.Conditioning.Input("first"), io.Conditioning.Input("second")], [io.Conditioning.Output()])
def prompt_rows(first: Any, second: Any) -> Any:
    """One conditioning with a row for each image of a batch of two."""
    pooled = torch.cat([each[0][1]["pooled_output"] for each in (first, second)])
    return [[torch.cat([first[0][0], second[0][0]]), {"pooled_output": pooled}]]


@node([io.Model.Input("model"), io.String.Input("run")], [io.Model.Output()])
def observe(model: Any, run: str) -> Any:
    """`run` differs from graph to graph, so that ComfyUI's cache doesn't carry one's nodes to another."""
    observer.observe(model.model.diffusion_model)
    return model.clone()


@node([io.AnyType.Input("value"), io.AnyType.Input("other")], [io.AnyType.Output()])
def after(value: Any, other: Any) -> Any:
    """The value, once the other is there too: an order of nodes that ComfyUI leaves open otherwise."""
    return value


@node([io.Latent.Input("latent")], [io.Image.Output()])
def latent_picture(latent: dict) -> Any:
    return latent["samples"][:, :3].movedim(1, -1).sigmoid()


@node([io.Image.Input("images")], [], is_output_node=True)
def keep(images: Tensor) -> Any:
    """The pictures as they are, bit by bit, for the test process."""
    import folder_paths
    from safetensors.torch import save_file

    name = f"{uuid.uuid4().hex}.safetensors"
    save_file({"images": images.contiguous()}, Path(folder_paths.get_temp_directory()) / name)
    return io.NodeOutput(ui={"kept": [{"filename": name, "subfolder": "", "type": "temp"}]})


@node(
    [io.Conditioning.Input("conditioning"), io.Model.Input("model"), io.Int.Input("tokens")],
    [io.Conditioning.Output()],
)
def control(conditioning: list, model: Any, tokens: int) -> Any:
    extra = _world().control(model, tokens)
    return [[cond, said | extra] for cond, said in conditioning]


@node([io.Conditioning.Input("conditioning")], [io.Conditioning.Output()])
def gligen(conditioning: list) -> Any:
    """A box of the kind of GLIGEN's, which a transformer pays no heed to."""
    from comfy.model_patcher import ModelPatcher

    class Boxes(torch.nn.Module):
        def set_position(self, *_: Any) -> Callable:
            return lambda x, extra: x

        set_empty = set_position

    device = torch.device("cpu")
    box = ("position", ModelPatcher(Boxes(), device, device), [(torch.zeros(1, 16), 2, 2, 0, 0)])
    return [[cond, {**said, "gligen": box}] for cond, said in conditioning]


# Nodes that sample by themselves.


def _sample(model: Any, positive: Any, negative: Any, latent: Tensor, seed: int, **more: Any) -> Tensor:
    import comfy.sample

    noise = comfy.sample.prepare_noise(latent, seed)
    settings = {"denoise": 1.0, "disable_pbar": True, "seed": seed} | more
    given = positive, negative, latent
    return comfy.sample.sample(model, noise, STEPS, 2.0, "euler", "simple", *given, **settings)


@node(SAMPLING, [io.Latent.Output()])
def own_sampler(model: Any, positive: Any, negative: Any, latent: dict, seed: int) -> Any:
    return {"samples": _sample(model, positive, negative, latent["samples"], seed)}


@node(SAMPLING, [io.Latent.Output()])
def tiles(model: Any, positive: Any, negative: Any, latent: dict, seed: int) -> Any:
    """Two halves, each sampled for itself, as upscalers do."""
    halves = latent["samples"].chunk(2, -1)
    return {"samples": torch.cat([_sample(model, positive, negative, half, seed) for half in halves], -1)}


@node([*SAMPLING, io.Model.Input("refiner")], [io.Latent.Output()])
def base_and_refiner(model: Any, positive: Any, negative: Any, latent: dict, seed: int, refiner: Any) -> Any:
    """Samples with one model, and goes over it with another."""
    first = _sample(model, positive, negative, latent["samples"], seed)
    return {"samples": _sample(refiner, positive, negative, first, seed, denoise=0.5)}


@node([*SAMPLING, io.Conditioning.Input("other")], [io.Latent.Output(), io.Latent.Output()])
def threads(model: Any, positive: Any, negative: Any, latent: dict, seed: int, other: Any) -> Any:
    """Two samplings of one model at once, step by step side by side."""
    together, found = threading.Barrier(2, timeout=60), {}

    def run(which: int, prompt: Any) -> None:
        try:
            with torch.inference_mode():
                arrived = {"callback": lambda *_: together.wait()}
                found[which] = _sample(model, prompt, negative, latent["samples"].clone(), seed, **arrived)
        except BaseException as error:
            found[which] = error
            together.abort()

    work = [threading.Thread(target=contextvars.copy_context().run, args=(run, i, p))
            for i, p in enumerate((positive, other))]  # fmt: skip
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    errors = [out for out in found.values() if isinstance(out, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return io.NodeOutput(*({"samples": found[i]} for i in range(2)))


@node(
    [
        io.Model.Input("model", raw_link=True),
        io.Conditioning.Input("positive", raw_link=True),
        io.Conditioning.Input("negative", raw_link=True),
        io.Latent.Input("latent", raw_link=True),
        io.Int.Input("seed"),
    ],
    [io.Latent.Output()],
    enable_expand=True,
)
def expanded_sampler(model: Any, positive: Any, negative: Any, latent: dict, seed: int) -> Any:
    """A node that puts others in its place, as subgraphs and loops do."""
    from comfy_execution.graph_utils import GraphBuilder

    graph = GraphBuilder()
    settings = {"cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    given = {"positive": positive, "negative": negative, "latent_image": latent}
    sampler = graph.node("KSampler", model=model, seed=seed, steps=STEPS, **given, **settings)
    return io.NodeOutput(sampler.out(0), expand=graph.finalize())


# Nodes that change what a model does, as acceleration, guidance and error do.

MODEL: Any = {"inputs": [io.Model.Input("model")], "outputs": [io.Model.Output()]}


def _with_wrapper(model: Any, kind: str, wrapper: Callable) -> Any:
    model = model.clone()
    model.add_wrapper_with_key(kind, "a_later_node", wrapper)
    return model


def _options(args: tuple, kwargs: dict) -> dict:
    return kwargs.get("transformer_options") or next(a for a in args if isinstance(a, dict))


@node(**MODEL)
def overwrite(model: Any) -> Any:
    """Takes over a block for good, whatever was there."""

    def block(args: dict, extra: dict) -> dict:
        return extra["original_block"](args)

    def overwriting(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = _options(args, kwargs)
        replaced = options.get("patches_replace", {})
        blocks = {**replaced.get("dit", {}), ("double_block", 1): block}
        options["patches_replace"] = {**replaced, "dit": blocks}
        return executor(*args, **kwargs)

    return _with_wrapper(model, "diffusion_model", overwriting)


@node(**MODEL)
def compile_eagerly(model: Any) -> Any:
    """What TorchCompileModel does, without a compiler."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model.clone()
    set_torch_compile_wrapper(model=model, backend="eager")
    return model


@node(
    [*MODEL["inputs"], io.Combo.Input("rows", options=["positive", "last positive", "again"])],
    MODEL["outputs"],
)
def go_around(model: Any, rows: str) -> Any:
    """Gives some rows of the batch to the transformer itself, past every wrapper; or all of them, after
    they went the usual way."""

    def function(apply_model: Any, args: dict) -> Tensor:
        kinds, c = args["cond_or_uncond"], args["c"]
        if rows == "again":
            apply_model(args["input"], args["timestep"], **c)
            return apply_model.__self__._apply_model(args["input"], args["timestep"], **c)
        positive = [i for i, kind in enumerate(kinds) if kind == 0]
        around = positive if rows == "positive" else positive[-1:] if len(positive) > 1 else []
        size, outs = len(args["input"]) // len(kinds), []
        for i, kind in enumerate(kinds):
            mine = slice(i * size, (i + 1) * size)
            part = {k: v[mine] if isinstance(v, Tensor) else v for k, v in c.items()}
            options = c["transformer_options"]
            only = {"cond_or_uncond": [kind], "uuids": options["uuids"][i : i + 1]}
            part["transformer_options"] = {**options, **only}
            call = apply_model.__self__._apply_model if i in around else apply_model
            outs.append(call(args["input"][mine], args["timestep"][mine], **part))
        return torch.cat(outs)

    model = model.clone()
    model.set_model_unet_function_wrapper(function)
    return model


@node([*MODEL["inputs"], io.Combo.Input("by", options=["prompt", "image", "half"])], MODEL["outputs"])
def in_parts(model: Any, by: str) -> Any:
    """Runs a batch in parts, to save memory: by prompt, by image, or in halves that it says nothing of."""

    def function(apply_model: Callable, args: dict) -> Tensor:
        kinds, c, x = args["cond_or_uncond"], args["c"], args["input"]
        options, size = c["transformer_options"], len(x) // len(kinds)
        rows = torch.arange(len(x))
        parts = rows.split(len(x) // 2 if by == "half" else size)
        if by == "image":
            parts = [rows[i::size] for i in range(size)]
        out = torch.empty_like(x)
        for i, part in enumerate(parts):
            one = {"cond_or_uncond": kinds[i : i + 1], "uuids": options["uuids"][i : i + 1]}
            given = {k: v[part] if isinstance(v, Tensor) else v for k, v in c.items()}
            given["transformer_options"] = {**options, **(one if by == "prompt" else {})}
            out[part] = apply_model(x[part], args["timestep"][part], **given)
        return out

    model = model.clone()
    model.set_model_unet_function_wrapper(function)
    return model


@node(**MODEL)
def forward_pass_of_its_own(model: Any) -> Any:
    """Calls the model with the positive prompt once more, as it would be called without a sampler."""

    def after_guidance(args: dict) -> Tensor:
        x, prompt = args["input"], args["cond"][0]["model_conds"]
        given = {name: each.process_cond(batch_size=len(x)).cond for name, each in prompt.items()}
        options = {k: v for k, v in args["model_options"]["transformer_options"].items()}
        once_more = args["model"].apply_model(x, args["sigma"], transformer_options=options, **given)
        return args["denoised"] + 0.2 * (args["cond_denoised"] - once_more)

    model = model.clone()
    model.set_model_sampler_post_cfg_function(after_guidance)
    return model


@node(**MODEL)
def prompts_exchanged(model: Any) -> Any:
    """Puts other conditionings, without the ids of the first, in the place of those that a run began with."""

    def exchanging(executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        for group in guider.conds.values():
            group[:] = [{**each, "uuid": uuid.uuid4()} for each in group]
        return executor(*args, **kwargs)

    return _with_wrapper(model, "predict_noise", exchanging)


@node(
    [io.Model.Input("model"), io.Conditioning.Input("positive"), io.Conditioning.Input("negative")],
    [io.Guider.Output()],
)
def guider_with_names_of_its_own(model: Any, positive: Any, negative: Any) -> Any:
    import comfy.samplers

    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(
            self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None
        ) -> Any:
            conds = [self.conds["wanted"], self.conds["unwanted"]]
            model = self.inner_model
            one, other = comfy.samplers.calc_cond_batch(model, conds, x, timestep, model_options)
            return other + 2.0 * (one - other)

    guider = Guider(model)
    guider.inner_set_conds({"wanted": positive, "unwanted": negative})
    return guider


@node(**MODEL)
def every_other_step(model: Any) -> Any:
    """Uses each answer of the model twice, as caches of steps do."""
    kept: list[Tensor] = []

    def function(apply_model: Callable, args: dict) -> Tensor:
        if kept and kept[0].shape == args["input"].shape:
            return kept.pop()
        kept[:] = [apply_model(args["input"], args["timestep"], **args["c"])]
        return kept[0]

    model = model.clone()
    model.set_model_unet_function_wrapper(function)
    return model


@node(**MODEL)
def strip(model: Any) -> Any:
    """The model without anything that others put on it."""
    model = model.clone()
    model.model_options, model.wrappers = {"transformer_options": {}}, {}
    return model


@node(**MODEL)
def not_a_number(model: Any) -> Any:
    model = model.clone()
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * float("nan"))
    return model


def _at_third_call(model: Any, act: Callable[[], None]) -> Any:
    calls: list[None] = []

    def counting(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            act()
        return executor(*args, **kwargs)

    return _with_wrapper(model, "apply_model", counting)


@node(**MODEL)
def interrupted(model: Any) -> Any:
    """As if the user interrupted the run at its third step."""
    from comfy.model_management import interrupt_current_processing

    return _at_third_call(model, interrupt_current_processing)


@node(**MODEL)
def failing(model: Any) -> Any:
    """A block that raises at the third step."""

    def act() -> None:
        raise RuntimeError("an error in a block")

    return _at_third_call(model, act)


@node([io.Combo.Input("scope", options=["all", "hooked"])], [io.Hooks.Output()])
def hooks_with_options(scope: str) -> Any:
    """Hooks that carry a replacement of a block and a wrapper, for one conditioning or for all."""
    import comfy.hooks

    def block(args: dict, extra: dict) -> dict:
        return extra["original_block"](args)

    def passing(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return executor(*args, **kwargs)

    scopes = comfy.hooks.EnumHookScope
    options = {
        "patches_replace": {"dit": {("double_block", 1): block}},
        "wrappers": {"apply_model": {"a_hook": [passing]}},
    }
    hook = comfy.hooks.TransformerOptionsHook(
        options, scopes.AllConditioning if scope == "all" else scopes.HookedOnly
    )
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return group


from . import hostile  # noqa: E402, F401  its nodes are made with what is above


class TestPack(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> TestPack:
    observer.serve()
    return TestPack()
