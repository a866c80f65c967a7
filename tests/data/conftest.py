"""Small tokenizers and token stores of known content."""

import json

import numpy as np
import pytest
from tiny import byte_tokenizer
from tokenizers.processors import TemplateProcessing

from rwkvinside.data.token_store import TokenStore

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(chat_template=CHATML):
    """One id per byte (256 of them) and four special tokens, so that ids can be read back as text."""
    special = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
    return byte_tokenizer(*special, bos_token="<s>", eos_token="</s>", chat_template=chat_template)


@pytest.fixture
def make_tokenizer():
    return _tokenizer


@pytest.fixture
def tokenizer():
    return _tokenizer()


@pytest.fixture
def framing():
    """Make a tokenizer put <s> before and </s> after every text, as some released ones do."""

    def framing(tokenizer):
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=special)
        return tokenizer

    return framing


def _store(documents, loss=None):
    """A store in memory from lists of ids (and of 0/1)."""
    return TokenStore(
        tokens=np.concatenate([np.array(d, dtype=np.uint32) for d in documents]),
        offsets=np.cumsum([0] + [len(d) for d in documents]),
        hashes=np.arange(len(documents), dtype=np.uint64),
        loss=None if loss is None else np.concatenate([np.array(x, dtype=np.uint8) for x in loss]),
        selected=np.arange(len(documents)),
        fingerprint="test",
        max_id=max(map(max, documents)),
    )


def _write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture
def make_store():
    return _store


@pytest.fixture
def write_jsonl():
    return _write_jsonl
