"""Tokens of texts as a run has them."""

import numpy as np

from rwkvinside.data.token_store import TokenStore


def token_store(texts, max_id):
    """Texts in order, all selected, every token a target."""
    return TokenStore(
        tokens=np.concatenate(texts),
        offsets=np.cumsum([0, *map(len, texts)]),
        hashes=np.arange(len(texts), dtype=np.uint64),
        loss=None,
        selected=np.arange(len(texts)),
        fingerprint="test",
        max_id=max_id,
    )
