"""The one inference form of a sparse autoencoder (Eq. 4-5).

    x = (a - mean) / scale        h = W_e x + b_e        z_j = h_j where h_j > threshold_j, else 0
    x_hat = W_d^T z + b_d         a_hat = scale x_hat + mean

ReLU is threshold 0; BatchTopK and JumpReLU are stored with their thresholds. Each feature
depends on its own rows alone, so any subset of features can be evaluated without the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SAE:
    """F features over activations of width d."""

    encoder_weight: Tensor  # [F, d]
    encoder_bias: Tensor  # [F]
    threshold: Tensor  # [F]
    decoder_weight: Tensor  # [F, d]
    decoder_bias: Tensor  # [d]
    mean: Tensor  # [d]
    scale: Tensor  # []

    @property
    def features(self) -> int:
        return self.encoder_weight.shape[0]

    @property
    def width(self) -> int:
        return self.encoder_weight.shape[1]

    def encode(self, a: Tensor) -> Tensor:
        """Activations [..., d] -> code z [..., F]."""
        h = ((a - self.mean) / self.scale) @ self.encoder_weight.T + self.encoder_bias
        return torch.where(h > self.threshold, h, 0.0)

    def decode(self, z: Tensor) -> Tensor:
        """Code [..., F] -> activations [..., d]."""
        return self.scale * (z @ self.decoder_weight + self.decoder_bias) + self.mean

    def reconstruct(self, a: Tensor) -> Tensor:
        return self.decode(self.encode(a))

    def rows(self, index: Tensor | slice) -> SAE:
        """The SAE of a subset of features; each keeps its exact code."""
        names = ("encoder_weight", "encoder_bias", "threshold", "decoder_weight")
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def to(self, *args: object, **kwargs: object) -> SAE:
        """Like Tensor.to, for every tensor."""
        return SAE(**{f.name: getattr(self, f.name).to(*args, **kwargs) for f in fields(self)})


def quality(sae: SAE, parts: Iterable[Tensor], chunk: int = 8192) -> dict[str, float]:
    """How well `sae` explains activations, given in parts [N, d].

    fvu: fraction of variance unexplained, |a - a_hat|^2 / |a - mean(a)|^2; l0: features active
    per token; dead: fraction of features that never fire on them.
    """
    error = squares = active = 0.0
    count, total = 0, torch.zeros(sae.width, dtype=torch.float64)
    fired = torch.zeros(sae.features, dtype=torch.bool)
    for part in (rows.float() for whole in parts for rows in whole.split(chunk)):
        z = sae.encode(part)
        error += (part - sae.decode(z)).double().square().sum().item()
        squares += part.double().square().sum().item()
        total += part.double().sum(0)
        count += len(part)
        active += (z > 0).sum().item()
        fired |= (z > 0).any(0)
    variance = squares - total.square().sum().item() / max(count, 1)
    return {
        "fvu": error / max(variance, 1e-12),
        "l0": active / max(count, 1),
        "dead": 1.0 - fired.float().mean().item(),
    }
