"""A tokenizer as llama.cpp knows it: byte-level BPE with one of its rules for cutting words, or SentencePiece's BPE."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ...errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens

# How byte-level tokenizers cut text before they merge: expression in tokenizer.json -> llama.cpp's name of the rule.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLITS = {
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
}
GPT2, DIGITS = "gpt-2", "smollm"  # the expression of ByteLevel itself, alone and behind single digits
MERGES_IGNORED = {"llama-bpe"}  # rules with which llama.cpp takes a word that is a token as it is
SUPPORTED = (
    "byte-level BPE that cuts words as GPT-2, SmolLM2, Qwen2 or Llama 3 do, or SentencePiece BPE with bytes whose "
    "normalizer puts a space before a text"
)


@dataclass
class Vocabulary:
    """What the file says of a tokenizer; fields that are None are left out.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece).
        pre: llama.cpp's name of the rule that cuts words.
        tokens, types: of every row of the embedding; rows without a token are unused.
        merges: of byte-level BPE.
        scores: of SentencePiece: higher ones merge first.
        add_bos, add_eos: the tokenizer puts these tokens around a text.
        add_space_prefix: SentencePiece puts a space before a text.
        ids: of special tokens, by llama.cpp's name (bos, eos, eot, unk, pad).
        chat_templates: by llama.cpp's name of the field: `chat_template`, and `chat_template.NAME` of others.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool | None = None
    ids: dict[str, int] = field(default_factory=dict)
    chat_templates: dict[str, Any] = field(default_factory=dict)


def vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Vocabulary:
    """Return what llama.cpp has to know of a tokenizer.

    Args:
        tokenizer: the teacher's.
        config: the teacher's, which may know more ends of a text, and its begin.

    Raises:
        UserError: llama.cpp has no tokenizer that works like this one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown("it has no tokenizer.json")
    facts = json.loads(backend.to_str())
    if facts["model"]["type"] != "BPE":
        raise _unknown(f"its model is {facts['model']['type']}")
    rows = config.vocab_size
    found = _sentencepiece(facts, rows) if facts["model"].get("byte_fallback") else _byte_level(facts, rows)
    found.add_bos, found.add_eos = _ends(tokenizer)
    own, eos = tokenizer.eos_token_id, config.eos_token_id
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    ends = [own] if own is not None and (own in eos or not eos) else list(eos[:1])
    end = ends[0] if ends else None
    # without one of its own llama.cpp would take id 11 for the first token, whatever that is
    begin = next((i for i in (tokenizer.bos_token_id, config.bos_token_id, end) if i is not None), None)
    # the end of a turn is what a chat's tokenizer calls the end
    names = {"bos": begin, "eos": end, "eot": end if len(eos) > 1 else None}
    names |= {"unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    found.ids = {name: i for name, i in names.items() if i is not None}
    found.chat_templates = _templates(tokenizer.chat_template)
    return found


def _byte_level(facts: dict, rows: int) -> Vocabulary:
    pre, merges = _rule(facts.get("pre_tokenizer") or {}), facts["model"]["merges"]
    if pre is None and merges:
        raise _unknown("it cuts words by a rule that llama.cpp does not have")
    if merges and bool(facts["model"].get("ignore_merges")) != (pre in MERGES_IGNORED):
        raise _unknown(f"ignore_merges is not what llama.cpp does with its rule {pre}")
    if other := {step["type"] for step in _steps(facts.get("normalizer") or {}, "normalizers")} - {"NFC"}:
        raise _unknown(f"it changes texts before it cuts them ({min(other)})")
    tokens, types = _tokens(facts, rows)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    # llama.cpp wants at least one: of a tokenizer of single bytes one that makes no token, which is then undone
    return Vocabulary("gpt2", pre or GPT2, tokens, types, merges=merges or [" ".join(tokens[:1] * 2)])


def _sentencepiece(facts: dict, rows: int) -> Vocabulary:
    steps = list(_steps(facts.get("normalizer") or {}, "normalizers"))
    cuts = list(_steps(facts.get("pre_tokenizer") or {}, "pretokenizers"))
    if not {step["type"] for step in steps} <= {"Prepend", "Replace"}:
        raise _unknown("it changes texts before it cuts them")
    # another space before what follows a special token, or before a text that begins with one: llama.cpp has it always
    if any(step["type"] != "Metaspace" or step.get("prepend_scheme") != "never" for step in cuts) or not steps + cuts:
        raise _unknown("it puts spaces before words by a pre-tokenizer, unlike llama.cpp")
    tokens, types = _tokens(facts, rows)
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(facts["model"]["merges"])))}
    scores = [float(-ranks.get(token, 0)) for token in tokens]
    prefixed = any(step["type"] == "Prepend" for step in steps)
    return Vocabulary("llama", "default", tokens, types, scores=scores, add_space_prefix=prefixed)


def _rule(pre_tokenizer: dict) -> str | None:
    """Return llama.cpp's name of the rule by which a byte-level tokenizer cuts words, None if it has none."""
    *before, last = [*_steps(pre_tokenizer, "pretokenizers")] or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not before:
        return GPT2 if last.get("use_regex", True) else None
    first = before[0]
    if len(before) > 1:
        return None
    if first["type"] == "Digits" and first.get("individual_digits") and last.get("use_regex", True):
        return DIGITS
    is_split = first["type"] == "Split" and first.get("behavior") == "Isolated" and not first.get("invert")
    return SPLITS.get(first["pattern"].get("Regex", "")) if is_split and not last.get("use_regex", True) else None


def _steps(part: dict, name: str) -> Iterator[dict]:
    """Yield the steps of a normalizer or pre-tokenizer; `name` is that of the list in a sequence."""
    if part.get("type") == "Sequence":
        for step in part[name]:
            yield from _steps(step, name)
    elif part:
        yield part


def _tokens(facts: dict, rows: int) -> tuple[list[str], list[int]]:
    """Return the token of every row, and its type."""
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    fallback, unknown = facts["model"].get("byte_fallback"), facts["model"].get("unk_token")
    added = {entry["content"]: entry for entry in facts["added_tokens"]}
    ids = facts["model"]["vocab"] | {text: entry["id"] for text, entry in added.items()}
    if outside := [text for text, i in ids.items() if i >= rows]:
        raise UserError(
            f"the tokenizer has the token {outside[0]!r} with id {ids[outside[0]]}, and the model {rows} rows",
            "use the tokenizer that belongs to the model",
        )
    for text, i in ids.items():
        tokens[i] = text
        if text == unknown and fallback:
            types[i] = UNKNOWN
        elif text in added:
            types[i] = CONTROL if added[text]["special"] else USER_DEFINED
        else:
            is_byte = fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
            types[i] = BYTE if is_byte else NORMAL
    return tokens, types


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Return whether a text gets a bos token before it and an eos token behind it."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before = whole[: len(whole) - len(bare)] if whole[-len(bare) :] == bare else whole[:1]
    return tokenizer.bos_token_id in before, whole[-1] == tokenizer.eos_token_id != bare[-1]


def _templates(template: str | dict[str, str] | None) -> dict[str, Any]:
    if not isinstance(template, dict):
        return {"chat_template": template} if template else {}
    named = {name: text for name, text in template.items() if name != "default"}
    fields: dict[str, Any] = {f"chat_template.{name}": text for name, text in named.items()}
    fields |= {"chat_templates": sorted(named)} if named else {}
    return fields | ({"chat_template": template["default"]} if "default" in template else {})


def _unknown(reason: str) -> UserError:
    return UserError(f"llama.cpp cannot use the teacher's tokenizer: {reason}", f"supported: {SUPPORTED}")
