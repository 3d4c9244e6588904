"""The command line: every command prints a short report, writes --json, resumes, fails in one line."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import NoReturn

from .. import __version__, seeds
from ..distributed import Interrupted, joined
from ..evaluators import EVALUATORS
from ..pocket.model import MODELS
from ..progress import ProgressLine
from ..recipe import Recipe
from ..steering.calibration import PROMPTS
from .commands import (
    FULL_SIZE,
    run_adapt,
    run_bench,
    run_calibrate,
    run_capture,
    run_check,
    run_demo,
    run_evaluate,
    run_export,
    run_import,
    run_inspect,
    run_make,
    run_route,
    run_train,
    run_tune,
)
from .hub import add_commands
from .verify import add_command


class Parser(argparse.ArgumentParser):
    """Ends in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help says more)\n")


def count(text: str) -> int:
    """A whole number from 1 up."""
    return _whole(text, 1, 1 << 53)


def seed(text: str) -> int:
    return _whole(text, 0, seeds.MOST - 1)


def share(text: str) -> float:
    """A number between 0 and 1."""
    with suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text:.40} is not a number between 0 and 1")


def _whole(text: str, least: int, most: int) -> int:
    if not (text.isdecimal() and text.isascii() and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text:.40} is not a whole number from {least} to {most}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="python -m safedig_core", description="SafeDIG: steer inside the model.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
        return sub

    def model(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", default=MODELS[0], choices=MODELS)
        sub.add_argument("--seed", type=seed, default=0)

    def any_model(sub: argparse.ArgumentParser) -> None:
        known = f"{', '.join(MODELS)}, or {FULL_SIZE}<folder or repository> of FLUX.1 or SD3.5"
        sub.add_argument("--model", default=MODELS[0], help=known)
        sub.add_argument(
            "--size", type=count, default=1024, help="of a full-size model's pictures, in pixels"
        )
        sub.add_argument("--seed", type=seed, default=0)

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    def evaluation(sub: argparse.ArgumentParser) -> None:
        model(sub)
        sub.add_argument("--prompts", type=Path, help="evaluation set, in place of the shipped one")
        sub.add_argument("--images-per-prompt", type=count, default=1)

    def judged(sub: argparse.ArgumentParser) -> None:
        known = ", ".join(EVALUATORS)
        sub.add_argument(
            "--evaluators", type=names, default=[], help=f"comma-separated, of {known}; default: none"
        )
        sub.add_argument(
            "--unblurred", action="store_true", help="write pictures as they are: they may be unsafe"
        )

    def strengths(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--blend", type=float, help="the largest strength that tuning may choose; 0: none")
        sub.add_argument("--repel", type=float, help="the same for Repel")
        sub.add_argument(
            "--window",
            type=float,
            nargs=2,
            metavar=("START", "END"),
            help="noise levels at which image tokens are steered",
        )

    def recipe(sub: argparse.ArgumentParser, required: bool = True) -> None:
        sub.add_argument(
            "--tune",
            type=Path,
            required=required,
            help="prompts to tune strengths and calibrate on, kept out of --store",
        )
        sub.add_argument(
            "--texts",
            type=Path,
            nargs="*",
            help="prompts that only the text encoder reads; default: the pack's 2,600 safe ones",
        )
        strengths(sub)
        credits(sub)

    def credits(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--title", default="")
        sub.add_argument("--creator", default="")
        sub.add_argument("--data-licence", default="")
        sub.add_argument("--weights-licence", default="")
        sub.add_argument("--out", type=Path, required=True)
        sub.add_argument(
            "--overwrite",
            action="store_true",
            help="replace what is at --out; without, only the result of the same settings may be there",
        )

    sub = command("demo", run_demo, "the whole method on the pocket model, with a report")
    evaluation(sub)
    sub.add_argument("--out", type=Path, default=Path("out/demo"))

    sub = command("make", run_make, "the chain as one command, with a plan of time, disk and memory first")
    any_model(sub)
    sub.set_defaults(size=None)
    sub.add_argument("--source", required=True, help="the risk domain to train on")
    sub.add_argument("--targets", type=names, help="comma-separated: domains to adapt to")
    sub.add_argument("--pairs", type=Path, nargs="*", help="prompt files; default: those that ship")
    sub.add_argument("--safe", type=Path, help="safe prompts, with --pairs; default: those that ship")
    sub.add_argument("--quick", action="store_true", help="fewer prompts, features and pixels")
    sub.add_argument("--gpu-memory", type=float, metavar="GB", help="that may be taken; default: all")
    sub.add_argument("--positions", type=names, help="to capture; default: some over the model's depth")
    sub.add_argument("--tokens", type=count, help="to capture of each picture; default: 256")
    for name in ("features", "k", "steps", "batch"):
        sub.add_argument(f"--{name}", type=count, help="of training")
    judged(sub)
    credits(sub)

    sub = command("capture", run_capture, "sample prompt pairs and store their activations")
    any_model(sub)
    sub.add_argument("--prompts", type=Path, required=True)
    sub.add_argument("--store", type=Path, required=True)
    sub.add_argument("--positions", type=names, help="comma-separated; default: all")
    sub.add_argument("--steps", type=count, default=6, help="how many sampling steps to capture")
    sub.add_argument("--tokens", type=count, help="tokens per image; default: all. Of prompts all are kept")
    sub.add_argument("--pairs-per-shard", type=count, help="sampled at once; default: 12, or what fits")

    sub = command("route", run_route, "score positions and operators before any training")
    any_model(sub)
    sub.add_argument("--store", type=Path, required=True)
    sub.add_argument("--source", required=True)
    sub.add_argument("--target", required=True)
    sub.add_argument("--tune", type=Path, required=True, help="pairs to sample, kept out of --store")
    sub.add_argument("--pairs", type=count, default=8, help="how many of each domain to sample")

    sub = command("train", run_train, "train a dictionary on the source domain")
    any_model(sub)
    sub.add_argument("--store", type=Path, required=True)
    sub.add_argument("--source", required=True)
    sub.add_argument("--target", help="for routing, where no --positions are given")
    sub.add_argument("--positions", type=names)
    sub.add_argument("--work", type=Path, default=Path("out/train"), help="folder for checkpoints")
    sub.add_argument("--kind", choices=("batch_topk", "relu_l1"))
    for name in ("features", "k", "steps", "batch"):
        sub.add_argument(f"--{name}", type=count)
    recipe(sub)

    sub = command("adapt", run_adapt, "adapt a dictionary's decoder to one more domain")
    any_model(sub)
    sub.add_argument("--store", type=Path, required=True)
    sub.add_argument("--dictionary", type=Path, required=True)
    sub.add_argument("--domain", required=True)
    sub.add_argument("--source", required=True, help="the domain to replay")
    recipe(sub)

    text = "choose a dictionary's operators and strengths anew, from paired removal"
    sub = command("tune", run_tune, text)
    any_model(sub)
    sub.add_argument("--dictionary", type=Path, required=True)
    sub.add_argument("--adapter", type=Path, help="of that dictionary: it is the one that is changed")
    sub.add_argument("--domain", help="where the file has several")
    sub.add_argument("--tune", type=Path, required=True, help="pairs that nothing was trained on")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--overwrite", action="store_true")
    strengths(sub)

    text = "set a dictionary's gate for your own model, size and sampler, from safe prompts alone"
    sub = command("calibrate", run_calibrate, text)
    any_model(sub)
    sub.add_argument("--dictionary", type=Path, required=True, help="the result is a small file beside it")
    sub.add_argument("--adapter", type=Path, nargs="*", default=[])
    sub.add_argument("--prompts", type=Path, help="safe ones; default: some of the pack's own")
    sub.add_argument("--most-prompts", type=count, default=PROMPTS, help="so many are sampled")
    sub.add_argument("--false-positive-rate", type=share, default=Recipe().false_positive_rate)

    sub = command("import", run_import, "a dictionary from SAEs of SAELens, sparsify or dictionary_learning")
    any_model(sub)
    sub.add_argument(
        "--sae",
        nargs=2,
        action="append",
        required=True,
        metavar=("POSITION", "FOLDER"),
        help="an SAE and the position it belongs to; repeat for more",
    )
    sub.add_argument("--store", type=Path, help="activations of the same positions, to measure and choose by")
    sub.add_argument("--source", help="with --store and --tune: choose features for this domain, adapt, gate")
    sub.add_argument("--like", type=Path, help="a dictionary for the same model, in place of --model")
    sub.add_argument(
        "--architecture",
        metavar="FAMILY,BLOCKS,BLOCKS,WIDTH,TEXT_WIDTH[,POOLED_WIDTH]",
        help="in place of --model: flux,19,38,3072,4096 is FLUX.1",
    )
    recipe(sub, required=False)

    sub = command("export", run_export, "write one position of a dictionary as an SAE of SAELens")
    sub.add_argument("--dictionary", type=Path, required=True)
    sub.add_argument("--position", required=True)
    sub.add_argument("--out", type=Path, required=True, help="folder")

    sub = command("evaluate", run_evaluate, "measure a dictionary against the unsteered model")
    any_model(sub)
    sub.add_argument(
        "--prompts", type=Path, help="evaluation set, in place of the shipped one; also I2P's, MMA's, COCO's"
    )
    sub.add_argument("--images-per-prompt", type=count, default=1)
    judged(sub)
    sub.add_argument("--dictionary", type=Path, required=True)
    sub.add_argument("--adapter", type=Path, nargs="*", default=[])
    text = "also each group of positions alone and left out, no gate, and the paper's form; of a pocket model"
    sub.add_argument("--ablations", action="store_true", help=text)
    sub.add_argument("--out", type=Path, default=Path("out/evaluate"))

    sub = command("bench", run_bench, "what steering, loading and capture cost, as ratios of one run")
    sub.add_argument("--families", type=names, help="flux1-dev, sd3.5-medium, sd3.5-large; default: all")
    sub.add_argument("--store", type=Path, help="a captured store, to compare training with SAE libraries on")
    sub.add_argument("--position", default="double.1.img", help="whose activations to train on")

    for name, run, text in (
        ("inspect", run_inspect, "show a dictionary's card"),
        ("check", run_check, "check a file to its last number"),
    ):
        command(name, run, text).add_argument("file", help="or an id of the index, or safedig://...")
    add_command(command)
    add_commands(command)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal can't show is no reason to end
        sys.stdout.reconfigure(errors="backslashreplace")
    o = parser().parse_args(arguments)
    who = o.command
    try:
        with joined() as o.processes:
            first = o.processes.rank == 0
            if o.processes.size > 1:
                who = f"{o.command} (process {o.processes.rank} of {o.processes.size})"
                if o.command not in ("capture", "train", "make"):
                    raise ValueError("this command is for one process: start it without torchrun")
            if o.json is not None and first:  # before the work, not after
                o.json.parent.mkdir(parents=True, exist_ok=True)
                o.json.open("a").close()
            with redirect_stdout(sys.stdout if first else io.StringIO()):
                result = o.run(o, ProgressLine(shown=first))
            if o.json is not None and first:
                o.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"{who}: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"{who}: stopped: {error}. Start the same command again to go on from here.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{who}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return getattr(o, "exit_code", 0)
