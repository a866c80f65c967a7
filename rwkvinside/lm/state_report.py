"""What a state holds layer by layer, whether that grows with the text, and what compressing it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import UserError
from ..support.progress import Progress
from .cache_parts import named_parts
from .compression import CompressedState
from .session import StatefulModel, logits_of

# parts of a `MixerState`; a slot of another kind holds keys and values of attention
KINDS = {"wkv": "recurrent", "shift": "recurrent", "window": "window"}


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer's part of a state, for all rows.

    Attributes:
        layer: its index.
        recurrent: the recurrent state, and the last input of a token shift.
        window: keys and values of a window beside a recurrence.
        attention: keys and values of an attention layer, windowed or not.
    """

    layer: int
    recurrent: int = 0
    window: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        """Of all kinds."""
        return self.recurrent + self.window + self.attention


def layer_bytes(state: Cache) -> list[LayerBytes]:
    """Return the bytes of every layer of a state, in which counters of a few bytes are included."""
    sizes = [{"recurrent": 0, "window": 0, "attention": 0} for _ in state.layers]
    for name, x in named_parts(state):
        layer, *rest = name.split(".")
        kind = KINDS.get(rest[1], "attention") if rest[0] == "state" else "attention"
        sizes[int(layer)][kind] += x.nbytes
    return [LayerBytes(i, **of_layer) for i, of_layer in enumerate(sizes)]


@dataclass(frozen=True)
class Growth:
    """A state after some tokens and after four times as many.

    Attributes:
        tokens: of the shorter text.
        short, long: bytes by layer.
        grows: layers that hold more after the longer one.
    """

    tokens: int
    short: list[LayerBytes]
    long: list[LayerBytes]

    @property
    def grows(self) -> list[int]:
        """Layers that hold more after the longer text."""
        return [a.layer for a, b in zip(self.short, self.long, strict=True) if b.total > a.total]

    def to_dict(self) -> dict:
        """Return plain JSON."""
        return {**asdict(self), "grows": self.grows}


def state_growth(model: StatefulModel, tokens: int, seed: int = 0) -> Growth:
    """Read random tokens, and measure the state after `tokens` of them and after four times as many."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (1, 4 * tokens), generator=draw).to(model.device)
    short = model.forward_chunked(ids[:, :tokens]).state
    long = model.forward_chunked(ids[:, tokens:], state=short).state
    return Growth(tokens, layer_bytes(short), layer_bytes(long))


@dataclass(frozen=True)
class CompressionCost:
    """What one format costs.

    Attributes:
        format: its name.
        bytes: of the state at the last compression, of one row.
        ratio: of that to the state as it was.
        tokens: that were predicted from restored states.
        kl: KL(exact || compressed) of their predictions, nats a token.
        agreement: share of tokens whose likeliest id is the same.
    """

    format: str
    bytes: int
    ratio: float
    tokens: int
    kl: float
    agreement: float


@torch.no_grad()
def compression_cost(
    model: StatefulModel,
    documents: Sequence[Tensor],
    formats: Sequence[str] = ("fp16", "int8"),
    chunk_size: int = 256,
    progress: Progress | None = None,
) -> list[CompressionCost]:
    """Measure what it costs to compress and restore the state after every chunk, so that errors add up.

    Args:
        model: in eval mode.
        documents: (T,) token ids each, read alone; only what follows the first chunk counts.
        formats: see `FORMATS`.
        chunk_size: tokens between two compressions.
        progress: counts the tokens of documents; gets its total here.

    Raises:
        UserError: no document is longer than a chunk.
    """
    documents = [ids for ids in documents if len(ids) > chunk_size + 1]
    if not documents:
        raise UserError(
            f"no document is longer than {chunk_size} tokens", "give longer documents or a smaller chunk size"
        )
    totals = {name: _Total() for name in formats}
    if progress is not None:
        progress.total = sum(map(len, documents))
    for ids in documents:
        _add_document(model, ids, chunk_size, totals)
        if progress is not None:
            progress.advance(len(ids))
    return [total.cost(name) for name, total in totals.items()]


class _Total:
    """Sums of a format."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # tokens, KL, agreement
        self.last: CompressedState

    def cost(self, name: str) -> CompressionCost:
        tokens, kl, agreement = self.sums.tolist()
        size = self.last.nbytes
        return CompressionCost(
            name, size, size / self.last.original_bytes, int(tokens), kl / tokens, agreement / tokens
        )


def _add_document(model: StatefulModel, ids: Tensor, chunk_size: int, totals: dict[str, _Total]) -> None:
    first, *chunks = ids[None, :-1].to(model.device).split(chunk_size, 1)
    _, exact = model.process_with_state(first)
    states = dict.fromkeys(totals, exact)
    for chunk in chunks:
        wanted, exact = model.process_with_state(chunk, exact)
        for name, total in totals.items():
            total.last = CompressedState.of(states[name], name)
            found, states[name] = model.process_with_state(chunk, total.last.restore())
            total.sums += _compared(logits_of(found)[0], logits_of(wanted)[0])


def _compared(found: Tensor, wanted: Tensor) -> Tensor:
    """Return how many tokens there are, the sum of their KL in fp64 and of how many agree."""
    log_q, log_p = (x.double().log_softmax(-1) for x in (found, wanted))
    kl = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum()  # a forbidden id contributes 0
    agree = (found.argmax(-1) == wanted.argmax(-1)).sum()
    return torch.stack([kl.new_tensor(len(found)), kl, agree.double()]).cpu()
