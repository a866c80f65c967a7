"""States of texts that were read before, so that a prompt with the same beginning is read from there on."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor
from transformers.cache_utils import Cache

from .compression import CompressedState
from .session import StatefulModel


class PrefixCache:
    """The states after some beginnings, the least recently used of which are dropped.

    A recurrent state cannot be cut back, so what is kept serves prompts that begin with all of its tokens: a system
    prompt, a document that is asked about, the conversation so far.

    Args:
        model: whose states these are.
        format: in which they are kept, see `CompressedState`.
        most: how many are kept.
    """

    def __init__(self, model: StatefulModel, format: str = "exact", most: int = 16) -> None:  # noqa: A002
        self._model, self._format, self._most = model, format, most
        self._kept: OrderedDict[tuple[int, ...], CompressedState] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of all states that are kept."""
        return sum(state.nbytes for state in self._kept.values())

    def keep(self, ids: Tensor, state: Cache) -> None:
        """Keep the state after the tokens (1, T)."""
        self._kept[tuple(ids[0].tolist())] = CompressedState.of(state, self._format)
        self._kept.move_to_end(tuple(ids[0].tolist()))
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def read(self, ids: Tensor) -> tuple[Tensor, Cache, int]:
        """Read a prompt (1, T) from the longest kept beginning on, but for its last token.

        Returns:
            The logits (1, V) after the last token, the state, and how many tokens needed no reading.
        """
        tokens = tuple(ids[0].tolist())
        known = [prefix for prefix in self._kept if len(prefix) < len(tokens) and tokens[: len(prefix)] == prefix]
        longest = max(known, key=len, default=())
        state = None
        if longest:
            self._kept.move_to_end(longest)
            state = self._kept[longest].restore()
        outputs = self._model.forward_chunked(ids[:, len(longest) :], state=state)
        return outputs.logits, outputs.state, len(longest)
