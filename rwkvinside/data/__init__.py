"""Data: readers, tokenisation with a cache, chat templates, packing. Knows nothing of models and training."""

from .batch import Batch, attention_mask_4d
from .encode import tokenizer_hash
from .packing import PackedRows, PaddedDocuments
from .store import TokenStore
from .tokens import load_tokens

__all__ = [
    "Batch",
    "PackedRows",
    "PaddedDocuments",
    "TokenStore",
    "attention_mask_4d",
    "load_tokens",
    "tokenizer_hash",
]
