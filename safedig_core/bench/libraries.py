"""Our training beside that of other libraries: the same activations, order, width, k and batch.

    python -m safedig_core.bench.libraries --store DIR --position double.1.img --json FILE

SAELens and dictionary_learning train their BatchTopK as they recommend; schedules that they state
in steps of far longer runs take the shares that ours has. Whatever isn't installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..features import split
from ..interop.convert import import_sae, with_l0
from ..sae import SAE, quality
from ..store.store import ActivationStore
from ..training import TrainSettings, train_sae

PACKAGES = {"sae_lens": "sae-lens", "dictionary_learning": "dictionary-learning"}  # module: on PyPI


@dataclass
class Batches:
    """The same batches in the same order, whoever asks, without an end; `times` says when."""

    tokens: Tensor  # [N, d]
    size: int
    seed: int
    times: list[float] = field(default_factory=list)

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    def epoch(self, number: int) -> Iterator[Tensor]:
        order = torch.randperm(len(self.tokens), generator=torch.Generator().manual_seed(self.seed + number))
        for index in order.split(self.size):
            if len(index) == self.size:
                self.times.append(time.perf_counter())
                yield self.tokens[index]

    def __iter__(self) -> Iterator[Tensor]:
        number = 0
        while True:
            yield from self.epoch(number)
            number += 1


def _ours(data: Batches, s: TrainSettings, lr: float | None) -> SAE:
    return train_sae(data.epoch, replace(s, lr=lr or s.lr))[0]


def _sae_lens(data: Batches, s: TrainSettings, lr: float | None) -> SAE:
    import sae_lens  # type: ignore
    from sae_lens.config import SAETrainerConfig  # type: ignore
    from sae_lens.training.sae_trainer import SAETrainer  # type: ignore

    torch.manual_seed(s.seed)
    config = sae_lens.BatchTopKTrainingSAEConfig(
        d_in=data.width, d_sae=s.features, k=s.k, normalize_activations="expected_average_only_in"
    )
    sae = sae_lens.BatchTopKTrainingSAE(config)
    schedule: dict[str, Any] = {"lr_warm_up_steps": s.warmup, "lr_decay_steps": s.steps // 5, "lr_end": 0.0}
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=s.steps * s.batch,
            train_batch_size_samples=s.batch,
            dead_feature_window=s.dead_after,
            n_batches_for_norm_estimate=10,
            lr=lr or SAETrainerConfig.lr,
            **schedule,
        ),
        sae,
        iter(data),
    )
    trainer.fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return import_sae(Path(folder), data.width)[0]


def _dictionary_learning(data: Batches, s: TrainSettings, lr: float | None) -> SAE:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # type: ignore
    from dictionary_learning.training import trainSAE  # type: ignore

    config = {
        "trainer": BatchTopKTrainer,
        "steps": s.steps,
        "activation_dim": data.width,
        "dict_size": s.features,
        "k": s.k,
        "layer": 0,
        "lm_name": "",
        "warmup_steps": s.warmup,
        "decay_start": s.steps * 4 // 5,
        "threshold_start_step": s.steps // 2,
        "seed": s.seed,
        "device": "cpu",
        "lr": lr,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(data, [config], steps=s.steps, save_dir=folder, normalize_activations=True, device="cpu")
        return import_sae(Path(folder) / "trainer_0", data.width)[0]


_TRAINERS: dict[str, Callable[[Batches, TrainSettings, float | None], SAE]] = {
    "safedig": _ours,
    "sae_lens": _sae_lens,
    "dictionary_learning": _dictionary_learning,
}


def training_rows(
    store: ActivationStore,
    position: str,
    settings: TrainSettings | None = None,
    *,
    lr: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Trains with every library at hand, one after the other, and measures on held-out prompts.

    A row is {"library", "tokens_per_s", "fvu", "l0", "dead"}: the batch over the median time from
    one batch to the next, which other work on the machine hardly moves; fvu, l0 and the share of
    features that never fire on the held-out tokens, each SAE with the threshold that leaves k
    features a token there. `lr`: one rate for all, in place of each one's own. `say` is told what
    runs and what is left out.
    """
    s = settings or TrainSettings()
    s = replace(s, warmup=min(s.warmup, s.steps // 10))  # a short run warms up for a tenth of it
    training, held_out = split(store.indices())
    tokens, unseen = store.tokens(position, training), store.tokens(position, held_out)
    rows: list[dict[str, Any]] = []
    for library, trainer in _TRAINERS.items():
        if library in PACKAGES and importlib.util.find_spec(library) is None:
            say(f"{library} is left out: it is not installed (pip install {PACKAGES[library]})")
            continue
        say(f"{library}: {s.steps} steps of {s.batch} tokens")
        data = Batches(tokens, s.batch, s.seed)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            sae = trainer(data, s, lr)
        step = median(after - before for before, after in pairwise(data.times))
        rows.append(
            {"library": library, "tokens_per_s": s.batch / step, **quality(with_l0(sae, s.k, unseen), unseen)}
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m safedig_core.bench.libraries", description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--position", required=True)
    for name in ("features", "k", "steps", "batch", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(TrainSettings, name))
    parser.add_argument("--lr", type=float, help="one learning rate for all, in place of each one's own")
    parser.add_argument("--json", type=Path, metavar="FILE")
    o = parser.parse_args()
    settings = TrainSettings(features=o.features, k=o.k, steps=o.steps, batch=o.batch, seed=o.seed)
    try:
        rows = training_rows(
            ActivationStore(o.store),
            o.position,
            settings,
            lr=o.lr,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    print(f"{'library':22}{'tokens/s':>10}{'FVU':>9}{'L0':>8}{'dead':>8}")
    for row in rows:
        print(
            f"{row['library']:22}{row['tokens_per_s']:10.0f}{row['fvu']:9.4f}{row['l0']:8.2f}{row['dead']:8.1%}"
        )
    if o.json is not None:
        o.json.write_text(json.dumps({"training": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
