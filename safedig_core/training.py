"""Source training of a sparse autoencoder and decoder-only transfer to a target domain (Eq. 12-15)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .dictionary.card import MAX_FEATURES
from .distributed import ALONE, Group
from .files import blame, clear_parts, loads, replacing
from .sae import SAE

AUX_WEIGHT = 1 / 32
_AGAIN = "Delete it, and train again."

Curve = list[dict[str, float]]  # step, fvu, l0 and dead, every 25 steps


@dataclass(frozen=True)
class TrainSettings:
    """`kind`: `batch_topk` (k features a token on average) or `relu_l1` (weight `l1`)."""

    kind: str = "batch_topk"
    features: int = 1024
    k: int = 24
    l1: float = 0.03
    steps: int = 1000
    batch: int = 1024  # tokens
    lr: float = 1e-3
    warmup: int = 100
    dead_after: int = 200  # steps without firing
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("batch_topk", "relu_l1"):
            raise ValueError(f"unknown kind of SAE '{self.kind}': expected batch_topk or relu_l1")
        if not 0 < self.features <= MAX_FEATURES:
            raise ValueError(f"features must lie between 1 and {MAX_FEATURES}, got {self.features}")
        if not 0 < self.k <= self.features:
            raise ValueError(f"k must lie between 1 and the {self.features} features, got {self.k}")
        for name, least in (("steps", 1), ("batch", 1), ("warmup", 1), ("dead_after", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not (0 <= self.l1 < math.inf and 0 < self.lr < math.inf):
            raise ValueError(f"l1 and lr must be numbers from 0 and over 0, got {self.l1} and {self.lr}")


def top_active(h: Tensor, count: int, guess: Tensor, group: Group = ALONE) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of h [N, F], whose rows `group` shares: BatchTopK.

    Returns the flat indices of those in this process's h, ascending, and the smallest of all, 0 if
    there is none. Fewer where fewer are over 0. Exact for any `guess` of the smallest, and several
    times as fast when that is good: only what lies near or over it needs to be ranked.
    """
    flat = h.flatten()
    candidates = (flat > 0.9 * guess).nonzero().flatten()
    values = group.gather(flat[candidates])
    if sum(map(len, values)) < count:
        candidates = (flat > 0).nonzero().flatten()
        values = group.gather(flat[candidates])
    ranked, own = torch.cat(values), values[group.rank]
    if len(ranked) > count:
        ranked, index = ranked.topk(count, sorted=False)
        index -= sum(map(len, values[: group.rank]))
        candidates = candidates[index[(index >= 0) & (index < len(own))]].sort().values
    return candidates, ranked.amin() if len(ranked) else h.new_zeros(())


class _SparseSAE(torch.autograd.Function):
    """z W_d for a code z that has the entries `active` of h = x W_e^T + b_e and is 0 elsewhere.

    Only those entries are multiplied, forward and backward: with k of F features active that saves
    all but the one dense product that makes h, which is F / k times as large as the others here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, active: Tensor, *parameters: Tensor) -> Tensor:
        features = h.shape[1]
        token, feature, z = active // features, active % features, h.flatten()[active]
        ctx.save_for_backward(x, token, feature, z, parameters[2])
        return _weighted_sums(parameters[2], feature, token, len(x), z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, token, feature, z, decoder = ctx.saved_tensors
        (g,) = gradients
        # dL/dz_j = g . w_j, the gradient of a weighted sum's weights
        with torch.enable_grad():
            weight = z.clone().requires_grad_()
            (dz,) = torch.autograd.grad(_weighted_sums(decoder, feature, token, len(x), weight), weight, g)
        order = feature.argsort(stable=True)
        token, feature, z, dz = token[order], feature[order], z[order], dz[order]
        one = torch.ones(len(x), 1, device=x.device, dtype=x.dtype)
        sums = len(decoder)
        d_encoder = _weighted_sums(x, token, feature, sums, dz)
        d_bias = _weighted_sums(one, token, feature, sums, dz)[:, 0]
        d_decoder = _weighted_sums(g.contiguous(), token, feature, sums, z)
        return None, None, None, d_encoder, d_bias, d_decoder


def _weighted_sums(rows: Tensor, row: Tensor, group: Tensor, groups: int, weight: Tensor) -> Tensor:
    """[groups, d]: the sum of weight_i rows[row_i] over each group; `group` ascends."""
    starts = torch.searchsorted(group, torch.arange(groups, device=group.device))
    return nn.functional.embedding_bag(row, rows, starts, mode="sum", per_sample_weights=weight)


class TrainingSAE(nn.Module):
    """The parameters of an SAE in training, in normalised space x = (a - mean) / scale."""

    def __init__(self, settings: TrainSettings, sample: Tensor):
        """`sample` [N, d]: the first activations, which fix mean and scale (mean |x|^2 = d)."""
        super().__init__()
        generator = torch.Generator().manual_seed(settings.seed)
        width = sample.shape[1]
        mean = sample.mean(0)
        self.settings = settings
        self.register_buffer("mean", mean)
        self.register_buffer("scale", (sample - mean).square().mean().sqrt().clamp(min=1e-6))
        decoder = torch.randn(settings.features, width, generator=generator)
        decoder /= decoder.norm(dim=1, keepdim=True)
        self.encoder_weight = nn.Parameter(decoder.clone())  # tied at the start: fewer dead features
        self.encoder_bias = nn.Parameter(torch.zeros(settings.features))
        self.decoder_weight = nn.Parameter(decoder)
        self.decoder_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("threshold", torch.zeros(()))  # running mean of the smallest active z
        self.register_buffer("idle", torch.zeros(settings.features))  # steps since a feature fired
        self.mean: Tensor
        self.scale: Tensor
        self.threshold: Tensor
        self.idle: Tensor

    def loss(self, a: Tensor, group: Group = ALONE) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch a [N, d] -> loss and figures. Updates the threshold and the idle counts.

        `group` shares its rows: the loss is this process's part of a sum, all else is of the batch.
        """
        s = self.settings
        whole = (a - self.mean) / self.scale
        x, count = group.share(whole), len(whole)
        parameters = (self.encoder_weight, self.encoder_bias, self.decoder_weight)
        if s.kind == "batch_topk":
            with torch.no_grad():
                h = torch.addmm(self.encoder_bias, x, self.encoder_weight.T)
            active, smallest = top_active(h, s.k * count, self.threshold, group)
            decoded = cast(Tensor, _SparseSAE.apply(x, h, active, *parameters))
            self.threshold.lerp_(smallest, torch.where(self.threshold == 0, 1.0, 0.01))
            sparsity, fired = 0.0, active % s.features
            firings = x.new_tensor(len(active))
        else:
            h = torch.addmm(self.encoder_bias, x, self.encoder_weight.T)
            z = torch.relu(h)
            decoded = z @ self.decoder_weight
            sparsity, fired = s.l1 * (z.sum(1).sum() / count) / x.shape[1], (z > 0).any(0)
            firings = (z > 0).float().sum()
        error = x - (decoded + self.decoder_bias)
        loss = error.square().sum(1).sum() / count / x.shape[1] + sparsity
        seen = x.new_zeros(s.features + 2)
        seen[:-2][fired] = 1
        with torch.no_grad():
            seen[-2], seen[-1] = error.square().sum(), firings
            group.sum_(seen)
            self.idle += 1
            self.idle[seen[:-2] > 0] = 0
            fvu = seen[-2] / (whole - whole.mean(0)).square().sum().clamp(min=1e-12)  # a batch of one
        dead = (self.idle > s.dead_after).nonzero().flatten()
        figures = {"fvu": fvu, "l0": seen[-1] / count, "dead": torch.tensor(len(dead) / s.features)}
        if len(dead):  # they learn what the living leave unexplained
            rows = self.decoder_weight[dead]
            value = x @ self.encoder_weight[dead].T + self.encoder_bias[dead]
            top = value.topk(min(len(dead), x.shape[1] // 2), dim=1)
            code = torch.zeros_like(value).scatter(1, top.indices, torch.relu(top.values))
            target = error.detach()
            unexplained = (target - code @ rows).square().sum(1).sum() / count / x.shape[1]
            loss = loss + AUX_WEIGHT * unexplained
        return loss, figures

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        self.decoder_weight /= self.decoder_weight.norm(dim=1, keepdim=True).clamp(min=1e-8)

    @torch.no_grad()
    def to_inference(self) -> SAE:
        """The inference form."""
        return SAE(
            encoder_weight=self.encoder_weight.detach().clone(),
            encoder_bias=self.encoder_bias.detach().clone(),
            threshold=self.threshold.expand(self.settings.features).clone(),
            decoder_weight=self.decoder_weight.detach().clone(),
            decoder_bias=self.decoder_bias.detach().clone(),
            mean=self.mean.clone(),
            scale=self.scale.clone(),
        )


def train_sae(
    batches: Callable[[int], Iterator[Tensor]],
    settings: TrainSettings,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
    group: Group = ALONE,
) -> tuple[SAE, Curve]:
    """Trains on `batches(epoch)`, which yields activations [batch, d], for `settings.steps` steps.

    With `checkpoint`, a killed run continues where it was and ends in the same SAE; what `progress`
    raises, every 25 steps, ends the run with its checkpoint written. The processes of
    `group` are given the same batches and share the rows of each: all end in the SAE of one process
    up to the order of sums, and the first writes checkpoints. Returns the SAE, on the CPU, and the
    training curve (fvu, l0, dead per 25 steps). Raises ValueError on no data.
    """
    first = next(batches(0), None)
    if first is None:
        raise ValueError("no activations to train on")
    trainee = TrainingSAE(settings, first).to(group.device)
    optimizer = torch.optim.Adam(trainee.parameters(), settings.lr, (0.9, 0.99), fused=True)
    curve: Curve = []
    done = 0
    if checkpoint is not None and checkpoint.exists():
        done, curve = _load_checkpoint(checkpoint, settings, trainee, optimizer)
    seen = [float(done), first.double().sum().item()]
    group.require_same(
        seen, "activations or checkpoints: the store and --work must be on a disk that all machines share"
    )
    for step, a in enumerate(_endless(batches)):
        if step >= settings.steps or done == settings.steps:
            break
        if step < done:  # the data of the steps that a killed run has already taken
            continue
        rate = min(1.0, (step + 1) / settings.warmup, 5 * (1 - step / settings.steps))
        for parameters in optimizer.param_groups:
            parameters["lr"] = settings.lr * rate
        loss, figures = trainee.loss(a.to(group.device), group)
        loss.backward()
        for parameter in trainee.parameters():
            if parameter.grad is not None:
                group.sum_(parameter.grad)
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trainee.normalise_decoder()
        if (step + 1) % 25 == 0 or step + 1 == settings.steps:
            point = {name: value.item() for name, value in figures.items()}
            curve.append({"step": step + 1, **point})
            if progress is not None:
                try:
                    progress(step + 1, point)
                except BaseException:  # cancelled: what has been learnt is kept
                    if checkpoint is not None and group.rank == 0:
                        _save_checkpoint(checkpoint, settings, trainee, optimizer, step + 1, curve)
                    raise
        saved = (step + 1) % 250 == 0 or step + 1 == settings.steps
        if checkpoint is not None and saved and group.rank == 0:
            _save_checkpoint(checkpoint, settings, trainee, optimizer, step + 1, curve)
    return trainee.to_inference().to("cpu"), curve


def _endless(batches: Callable[[int], Iterator[Tensor]]) -> Iterator[Tensor]:
    epoch = 0
    while True:
        yield from batches(epoch)
        epoch += 1


def _save_checkpoint(
    path: Path,
    settings: TrainSettings,
    trainee: TrainingSAE,
    optimizer: torch.optim.Optimizer,
    step: int,
    curve: Curve,
) -> None:
    tensors = {f"sae.{k}": v.contiguous() for k, v in trainee.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
    state = {"step": step, "settings": asdict(settings), "curve": curve}
    header = {"training": json.dumps(state)}  # one key: several would come in any order
    with blame(ValueError, path, "Nothing was written."):
        clear_parts(path.parent, path.name)
        with replacing(path) as part:
            save_file(tensors, part, header)


def read_curve(checkpoint: Path) -> Curve:
    """The training curve up to a checkpoint. Raises ValueError."""
    return _read_state(checkpoint).get("curve", [])


def _read_state(checkpoint: Path) -> dict[str, Any]:
    if not checkpoint.is_file():  # reading a pipe would not end
        raise ValueError(f"{checkpoint} is not a file: remove it, or choose another folder")
    with blame(ValueError, checkpoint, _AGAIN), safe_open(checkpoint, "pt") as file:
        return loads((file.metadata() or {}).get("training", "{}"))


def _load_checkpoint(
    path: Path, settings: TrainSettings, trainee: TrainingSAE, optimizer: torch.optim.Optimizer
) -> tuple[int, Curve]:
    meta = _read_state(path)
    with blame(ValueError, path, _AGAIN):
        tensors = load_file(path)
    if meta.get("settings") != asdict(settings):
        raise ValueError(f"{path} was written with other settings: delete it, or train with those")
    if not torch.equal(tensors["sae.mean"], trainee.mean.cpu()):
        raise ValueError(f"{path} was written with other activations: delete it, or train on those")
    trainee.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("sae.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key in (k for k in tensors if k.startswith("optimizer.")):
        _, index, name = key.split(".")
        state.setdefault(int(index), {})[name] = tensors[key]
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return meta["step"], meta["curve"]
