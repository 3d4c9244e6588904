"""Prompts that only the text encoder reads: what is usual at `text` and `pooled`, and what is risky there.

They cost no sampling, so there can be many and varied ones: sentences of every kind that are safe, and pairs
that name a domain's risk in many more words than are captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .hosts.host import Host
from .prompts import PromptPair
from .store.capture import spans_of
from .store.settings import Spans
from .store.store import aligned

POSITIONS = ("text", "pooled")
AT_ONCE = 256  # prompts


@dataclass
class Reading:
    """What prompts are at one position: bfloat16 [T, d] each, up to the last token that is no padding. What
    lies before it stays, as between SD3.5's encoders, so that tokens keep their places."""

    domains: list[str] = field(default_factory=list)
    unsafe: list[Tensor | None] = field(default_factory=list)  # None for purely safe prompts
    safe: list[Tensor] = field(default_factory=list)
    spans: list[Spans] = field(default_factory=list)

    def unsafe_of(self, domain: str) -> list[Tensor]:
        return [
            a for a, name in zip(self.unsafe, self.domains, strict=True) if name == domain and a is not None
        ]

    def pairs_of(self, domain: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Unsafe and safe tokens [N, d] of each pair, aligned by the edits between its prompts."""
        for name, unsafe, safe, spans in zip(self.domains, self.unsafe, self.safe, self.spans, strict=True):
            if name == domain and unsafe is not None:
                yield aligned(unsafe.float(), safe.float(), spans)


def read(
    host: Host, prompts: Sequence[PromptPair], progress: Callable[[int, int], None] | None = None
) -> dict[str, Reading]:
    """By position, in the order of `prompts`."""
    texts = list(dict.fromkeys(text for pair in prompts for text in pair.texts))
    at: dict[str, list[Tensor]] = {position: [] for position in POSITIONS}
    for start in range(0, len(texts), AT_ONCE):
        some = texts[start : start + AT_ONCE]
        sequence, pooled = host.text_states(some)
        for states, vector, tokens in zip(sequence, pooled, host.prompt_tokens(some), strict=True):
            length = max((i + 1 for i, token in enumerate(tokens) if token), default=0)
            at["text"].append(states[:length].bfloat16())
            at["pooled"].append(vector[None].bfloat16())
        if progress is not None:
            progress(start + len(some), len(texts))
    place = {text: i for i, text in enumerate(texts)}
    found = {position: Reading() for position in POSITIONS}
    for pair in prompts:
        whole: Spans = () if pair.unsafe is None else ((0, 1),)
        for position, spans in (("text", spans_of(host, pair)), ("pooled", whole)):
            reading = found[position]
            reading.domains.append(pair.domain)
            reading.unsafe.append(None if pair.unsafe is None else at[position][place[pair.unsafe]])
            reading.safe.append(at[position][place[pair.safe]])
            reading.spans.append(
                spans if position == "text" else ((0, 1),) if pair.unsafe is not None else ()
            )
    return found
