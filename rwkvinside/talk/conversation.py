"""A conversation with one model, which reads only what is new: all before is in its state.

Works for hybrids and for every other causal language model of transformers; knows no terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, TemperatureLogitsWarper
from transformers import TopPLogitsWarper as TopP
from transformers.cache_utils import Cache

from ..errors import UserError
from ..lm.cache_parts import fork
from ..lm.state_report import layer_bytes
from ..teacher.sampling import STAND_IN, Sampling, encode, end_tokens, render_chat

PREFILL = 1024  # tokens that are read at a time, so that a long text needs little memory


@dataclass(frozen=True)
class Reply:
    """What one reply took.

    Attributes:
        tokens: that were generated, without the one that ended it.
        read: tokens that were read before.
        first_seconds: of the reading.
        seconds: of the generation.
        ended: the model ended it, not the limit or the user.
    """

    tokens: int
    read: int
    first_seconds: float
    seconds: float
    ended: bool

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of generation, without the reading; None where nothing was generated."""
        return self.tokens / self.seconds if self.seconds else None


@dataclass
class Memory:
    """What a model has read.

    Attributes:
        ids: all tokens.
        cache: what they left in the model; None where nothing was read, or the model has yet to read it.
        text: of a conversation, as the chat template writes it; None where only the ids are known.
        messages: of the conversation.
    """

    ids: list[int] = field(default_factory=list)
    cache: Cache | None = None
    text: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def copy(self) -> Memory:
        """Return the same in memory of its own: models write into the one of a cache."""
        with torch.inference_mode():
            cache = None if self.cache is None else fork(self.cache)
        return Memory(list(self.ids), cache, self.text, list(self.messages))


class Conversation:
    """A model, and what has been said to it.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        sampling: how replies are drawn; two conversations with the same one draw the same random numbers.
        system: system prompt; it is read once and its state reused after `reset`.
        plain: no chat template: the model continues the text that it is given.

    Attributes:
        memory: what the model has read.
        last: the last reply; None before the first.

    Raises:
        UserError: the template refuses a conversation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        system: str = "",
        plain: bool = False,
    ):
        self.model, self.tokenizer, self.sampling, self.plain = model, tokenizer, sampling, plain
        self.last: Reply | None = None
        self._end = set(end_tokens(tokenizer, model))
        self._warpers = LogitsProcessorList()
        if sampling.temperature:
            self._warpers += [TemperatureLogitsWarper(sampling.temperature), TopP(sampling.top_p)]
        self._draw = torch.Generator(model.device).manual_seed(sampling.seed)
        self._start = Memory(messages=[{"role": "system", "content": system}] if system and not plain else [])
        self._ended = False
        beginning = self._system_ids(system)
        if beginning:
            self._read(self._start, beginning)
        self.memory = self._start.copy()

    def reset(self) -> None:
        """Forget all but the system prompt, whose state is not computed again."""
        self.memory, self._ended = self._start.copy(), False

    def recall(self, memory: Memory) -> None:
        """Go on from what was kept of another conversation.

        Args:
            memory: with its cache, or with ids alone, which are then read.
        """
        if memory.ids and memory.cache is None:
            ids, memory = memory.ids, Memory([], None, memory.text, memory.messages)
            self._read(memory, ids)
        self.memory, self._ended = memory, False

    def say(self, words: str, stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Read words and generate a reply.

        Args:
            words: a user's turn; in plain mode text to continue.
            stop: asked before every token, whether to end the reply.

        Yields:
            A piece of text for each token, which may be empty.

        Raises:
            UserError: there is nothing to read, or the template refuses the conversation.
        """
        started = time.perf_counter()
        ids, before = self._words(words)
        logits = self._read(self.memory, ids)
        first, seconds = time.perf_counter() - started, 0.0
        stream = DecodeStream(ids=self.memory.ids[-8:], skip_special_tokens=True)
        written: list[int] = []
        self._ended = False
        try:
            while len(written) < self.sampling.max_tokens and not stop():
                started = time.perf_counter()
                token = self._choose(logits)
                if token in self._end:
                    self._ended = True
                    break
                logits = self._read(self.memory, [token])
                written.append(token)
                seconds += time.perf_counter() - started  # not what others do between two tokens
                yield stream.step(self.tokenizer.backend_tokenizer, token) or ""
        finally:
            self.last = Reply(len(written), len(ids), first, seconds, self._ended)
            if not self.plain:
                reply = self.tokenizer.decode(written, skip_special_tokens=True)
                self.memory.text = before + reply
                self.memory.messages += [{"role": "user", "content": words}, {"role": "assistant", "content": reply}]

    @property
    def state_bytes(self) -> int:
        """Bytes of the state: recurrent states, and keys and values of attention layers."""
        cache = self.memory.cache
        return 0 if cache is None else sum(layer.total for layer in layer_bytes(cache))

    def _words(self, words: str) -> tuple[list[int], str]:
        """Return what there is to read of words, and in a conversation all of its text so far."""
        if self.plain:
            if self._ended:
                self.reset()  # a text that has ended does not go on
            # the tokenizer frames the beginning of a text only
            ids = self.tokenizer(words)["input_ids"] if not self.memory.ids else encode(self.tokenizer, words)
            if not ids:
                raise UserError(f"the tokenizer makes no token of {words!r}", "write something else")
            return self._without_end(ids), ""
        asked = [*self.memory.messages, {"role": "user", "content": words}]
        text = render_chat(self.tokenizer, asked, add_generation_prompt=True)
        known = self.memory.text
        if known is not None and text.startswith(known):
            return encode(self.tokenizer, text[len(known) :]), text
        # Templates may rewrite earlier turns, as those that drop thoughts do: what is read must be what they write.
        ids, messages = encode(self.tokenizer, text), self.memory.messages
        self.memory = self._start.copy()
        if ids[: len(self.memory.ids)] != self.memory.ids:
            self.memory = Memory()
        self.memory.messages = messages
        return ids[len(self.memory.ids) :], text

    def _without_end(self, ids: list[int]) -> list[int]:
        """Return ids without the tokens that the tokenizer ends a text with: it is to go on."""
        while ids and ids[-1] in self._end and len(ids) > 1:
            ids = ids[:-1]
        return ids

    def _system_ids(self, system: str) -> list[int]:
        """Return the tokens that every conversation begins with."""
        if not system:
            return []
        if self.plain:
            return self._without_end(self.tokenizer(system)["input_ids"])
        turns = (
            [{"role": "system", "content": system}, {"role": "user", "content": words}] for words in (STAND_IN, "a")
        )
        one, other = (
            encode(self.tokenizer, render_chat(self.tokenizer, turn, add_generation_prompt=False)) for turn in turns
        )
        same = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
        return one[:same]

    @torch.inference_mode()
    def _read(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        """Read tokens; return the logits (1, V) of the last one."""
        for start in range(0, len(ids), PREFILL):
            part = torch.tensor([ids[start : start + PREFILL]], device=self.model.device)
            out = self.model(part, past_key_values=memory.cache, use_cache=True, logits_to_keep=1)
            memory.cache = out.past_key_values
            memory.ids.extend(part[0].tolist())
        return out.logits[:, -1]

    @torch.inference_mode()
    def _choose(self, logits: Tensor) -> int:
        if not self.sampling.temperature:
            return int(logits.argmax(-1))
        chances = self._warpers(None, logits.float()).softmax(-1)  # type: ignore[arg-type]  # these look at no ids
        return int(torch.multinomial(chances, 1, generator=self._draw))
