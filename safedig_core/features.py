"""Two choices of features for a domain: those that act, and those that tell.

The features that *act* are those that contribute most to the paired map, from the code of an unsafe
activation to its change toward the safe one. The features that *tell* are a linear read-out for the gate,
learned against safe prompts of every form and the other domains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .files import need
from .prompts import SAFE
from .reading import Reading
from .recipe import Recipe
from .sae import SAE
from .store.store import ActivationStore

SELECT_EVERY = 4
PAIRS_AT_ONCE = 12
SHARPNESS = 8.0  # of the smooth maximum over a prompt's tokens, while a read-out is learned
READ_OUT_STEPS = 300


def split(indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """Pair indices for training, and those that quality is measured on."""
    return (
        [p for i, p in enumerate(indices) if i % SELECT_EVERY],
        [p for i, p in enumerate(indices) if i % SELECT_EVERY == 0],
    )


def chunks(indices: Sequence[int]) -> Iterator[list[int]]:
    """Some pairs at a time, so that a store reads each shard few times."""
    for start in range(0, len(indices), PAIRS_AT_ONCE):
        yield list(indices[start : start + PAIRS_AT_ONCE])


class ReadOut:
    """Learns one domain's read-out of one position, from images or prompts that are added one by one.

    Image tokens: an example is the mean code of one image's tokens at one step. Prompt tokens: an example is
    the codes of one prompt's tokens, of which the strongest counts.
    """

    def __init__(self, sae: SAE, position: str):
        self._sae = sae
        self._is_image = position.endswith("img")
        self._codes: list[Tensor] = []  # each [tokens, F]
        self._risky: list[bool] = []

    def add(self, images: Iterable[Tensor], risky: bool) -> None:
        """Activations [S, T, d] of images, or [1, T, d] of prompts; one without tokens says nothing."""
        for image in (image for image in images if image.shape[1]):
            code = self._sae.encode(image.float())
            examples = code.mean(1, keepdim=True) if self._is_image else code[:1]
            self._codes += [*examples]
            self._risky += [risky] * len(examples)

    def fit(self, most: int, penalty: float) -> tuple[list[int], list[float]]:
        """The `most` features that tell most, ascending, and their weights, by penalised logistic regression
        on all features and then on those."""
        lengths = torch.tensor([len(code) for code in self._codes])
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        z, risky = torch.cat(self._codes), torch.tensor(self._risky)
        spread = z.std(0)
        alive = (spread > 0).nonzero().flatten()
        weights = self._regress(z[:, alive] / spread[alive], owner, risky, penalty)
        best = alive[weights.abs().topk(min(most, len(alive))).indices.sort().values]
        weights = self._regress(z[:, best] / spread[best], owner, risky, penalty) / spread[best]
        return best.tolist(), weights.tolist()

    def _regress(self, x: Tensor, owner: Tensor, risky: Tensor, penalty: float) -> Tensor:
        """Weights [F] for tokens x [N, F] of examples `owner` [N]; both classes count the same."""
        count = len(risky)
        x = x - x.mean(0)  # else the bias pulls weights to where the maximum of a prompt says nothing
        share = torch.where(risky, 0.5 / risky.sum(), 0.5 / (~risky).sum())
        weight = torch.zeros(x.shape[1], requires_grad=True)
        bias = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=READ_OUT_STEPS, history_size=20, line_search_fn="strong_wolfe"
        )
        single = len(x) == count

        def loss() -> Tensor:
            optimizer.zero_grad()
            score = x @ weight
            if not single:  # a smooth maximum over the tokens of each prompt
                top = torch.full((count,), -torch.inf).scatter_reduce(0, owner, score.detach(), "amax")
                parts = ((score - top[owner]) * SHARPNESS).exp()
                total = torch.zeros(count).index_add(0, owner, parts)
                score = top + total.log() / SHARPNESS
            each = nn.functional.binary_cross_entropy_with_logits(
                score + bias, risky.float(), reduction="none"
            )
            value = (share * each).sum() + penalty * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
        return weight.detach()


def read_out(
    store: ActivationStore,
    position: str,
    sae: SAE,
    domain: str,
    recipe: Recipe,
    reading: Reading | None = None,
) -> tuple[list[int], list[float]]:
    """The features that tell `domain` at `position`, with their weights: its unsafe images against all safe
    ones and the other domains' unsafe ones; of prompt tokens also those that only the text encoder read."""
    readout = ReadOut(sae, position)
    for name in sorted({pair.domain for pair in store.prompts}):
        for some in chunks(store.indices(name)):
            for image in store.each(position, some):  # [sides, S, K, d]
                readout.add(image[-1:], False)
                if len(image) == 2:
                    readout.add(image[:1], name == domain)
    if reading is not None:
        readout.add((prompt[None] for prompt in reading.safe), False)
        for name in sorted({*reading.domains} - {SAFE}):
            readout.add((prompt[None] for prompt in reading.unsafe_of(name)), name == domain)
    features, weights = readout.fit(recipe.most_telling, recipe.penalty)
    need(features, f"no feature at {position} tells any prompt from others. Train longer, or leave it out.")
    return features, weights
