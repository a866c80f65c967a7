"""From documents to token ids and loss masks; and whether ids from outside belong to the tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ..errors import UserError
from .chat import asks_for_date, encode_conversation
from .defaults import DATE
from .records import Document, Question, content_hash
from .token_store import Encoded, TokenStore

CHUNK_DOCUMENTS = 512
CHUNK_BYTES = 4 << 20
SAMPLED_DOCUMENTS, SAMPLED_TOKENS = 64, 256  # of ids from outside, to see whether they belong to the tokenizer
AGREEMENT = 0.98  # share that must survive decoding and encoding; measured: 0.995 and more, others 0.54 to 0.954


class Encoder:
    """Encoder of documents into tokens.

    A text becomes prefix + its tokens + suffix: what the tokenizer itself puts around a text, since this is what the
    teacher sees in use (<s> for Llama, nothing for Qwen). A text that already begins with the prefix (or ends with the
    suffix) does not get it twice. Conversations get exactly what the chat template writes; a multiple-choice question
    is a conversation too, or a prompt with its completion where there is no template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        end: put the tokenizer's end-of-text token after every text and completion where it does not do so itself.
        rotate: encode every question once with each rotation of its options, so that each letter is right equally
            often.
        today: the day that chat templates see, as YYYY-MM-DD.

    Attributes:
        identity: JSON values that change when the tokens of a document may change.
    """

    def __init__(self, tokenizer, *, rotate: bool = True, today: str = DATE, end: bool = False) -> None:
        self.tokenizer, self.rotate, self.today = tokenizer, rotate, today
        self.prefix, self.suffix = _special_ids(tokenizer)
        if end and tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token", "set data.end_of_text=false"
            )
        if end and not self.suffix:
            self.suffix = [tokenizer.eos_token_id]
        self.identity = {
            "tokenizer": tokenizer_hash(tokenizer),
            "prefix": self.prefix,
            "suffix": self.suffix,
            "rotate": rotate,
        } | ({"today": today} if asks_for_date(tokenizer) else {})

    def __call__(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        """Yield the tokens of these documents.

        A document may give nothing (no token is left of it) or several encodings (rotations).

        Raises:
            UserError: a document that cannot be encoded; the message names it.
        """
        contents = [document.as_bytes() for document in documents]  # before the tokenizer, which names no document
        texts = [document.text for document in documents if document.kind == "text"]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        for document, content in zip(documents, contents, strict=True):
            digest = content_hash(content)
            versions = [(next(encoded), None, ())] if document.kind == "text" else self._masked(document)
            for ids, loss, facts in versions:
                if document.kind == "text" and ids:
                    prefix, suffix = self._frame(ids)
                    ids = prefix + ids + suffix
                if len(ids):
                    yield Encoded(digest, np.asarray(ids, dtype=np.uint32), loss, (f"kind {document.kind}", *facts))

    def _frame(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return the prefix and the suffix that these ids still lack."""
        prefix = [] if ids[: len(self.prefix)] == self.prefix else self.prefix
        return prefix, [] if ids[len(ids) - len(self.suffix) :] == self.suffix else self.suffix

    def _masked(self, document: Document) -> Iterator[tuple[Sequence[int], np.ndarray | None, tuple[str, ...]]]:
        """Yield (ids, loss mask, facts) of a document that is not plain text."""
        if document.kind == "tokens":
            yield document.ids, document.loss, ()
        elif document.kind == "conversation":
            yield *self._conversation(document.messages, document.where, document.tools), ()
        elif document.kind == "completion":
            yield *self._completion(document.prompt, document.text, document.where), ()
        else:
            original = document.question
            for turn in range(len(original.options) if self.rotate else 1):
                question = original.rotated(turn)
                facts = [f"answer {question.letters[question.answer]}"]
                facts += [f"given {original.letters[original.answer]}"] if turn == 0 else []
                yield *self._question(question, document.where), tuple(facts)

    def _question(self, question: Question, where: str) -> tuple[Sequence[int], np.ndarray]:
        letter = question.letters[question.answer]
        if not self.tokenizer.chat_template:
            return self._completion(f"{question.prompt}\nAnswer:", f" {letter}", where)
        asked = f"{question.prompt}\nAnswer with the letter of the right option."
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": letter}]
        return self._conversation(messages, where)

    def _conversation(
        self, messages: list[dict], where: str, tools: list[dict] | None = None
    ) -> tuple[list[int], np.ndarray]:
        return encode_conversation(self.tokenizer, messages, where, tools, self.today)

    def _completion(self, prompt: str, text: str, where: str) -> tuple[list[int], np.ndarray]:
        """Tokenize prompt and completion as one text.

        A token with any character of the completion belongs to the completion.
        """
        if not self.tokenizer.is_fast:
            raise UserError(f"{where}: prompts need a fast tokenizer, not {type(self.tokenizer).__name__}")
        encoded = self.tokenizer(prompt + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        prefix, suffix = self._frame(encoded["input_ids"])
        mask = [end > len(prompt) for _, end in encoded["offset_mapping"]]
        loss = [False] * len(prefix) + mask + [True] * len(suffix)
        return prefix + encoded["input_ids"] + suffix, np.array(loss, dtype=bool)


def chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield lists of documents, each large enough for one call of the tokenizer."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.as_bytes())
        if len(chunk) == CHUNK_DOCUMENTS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def tokenizer_hash(tokenizer) -> str:
    """Return the SHA-256 of all that decides the ids of a text.

    These are vocabulary, merges, normalization and chat template.
    """
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set by the last call of the tokenizer, not by its files.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        options = {name: str(value) for name, value in tokenizer.init_kwargs.items()}
        content = [type(tokenizer).__name__, tokenizer.get_vocab(), options]
    text = json.dumps([content, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_ids(store: TokenStore, tokenizer, source: str) -> None:
    """Refuse ids that the tokenizer would not give: decode and re-encode a sample.

    Raises:
        UserError: ids that the tokenizer does not have, or too few that come back.
    """
    if store.max_id >= len(tokenizer):
        raise UserError(
            f"{source} holds token id {store.max_id}, tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} ids",
            "it was tokenized with another tokenizer; tokenize the text again",
        )
    if (share := agreement(store, tokenizer)) < AGREEMENT:
        raise UserError(
            f"{source} does not fit the tokenizer {tokenizer.name_or_path!r}: of a sample of its tokens "
            f"{share:.0%} come back from decoding and encoding",
            "it was tokenized with another tokenizer; tokenize the text again, or trust it: data.check_ids=false",
        )


def agreement(store: TokenStore, tokenizer) -> float:
    """Return the share of a sample of tokens that survives decoding and encoding.

    It is close to 1 for the tokenizer that made them.
    """
    same, total = 0, 0
    special = set(tokenizer.all_special_ids)
    for i in np.linspace(0, store.num_documents - 1, min(SAMPLED_DOCUMENTS, store.num_documents)).astype(int):
        ids = [token for token in store.piece(i, 0, SAMPLED_TOKENS)[0].tolist() if token not in special]
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        again = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        same += (Counter(ids) & Counter(again)).total()
        total += max(len(ids), len(again))
    return same / total if total else 1.0


def _special_ids(tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain), None)
    if at is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} turns 'a' into {full}, which does not hold {plain}",
            "use a tokenizer that only adds tokens before and after",
        )
    return full[:at], full[at + len(plain) :]
