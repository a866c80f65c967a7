"""The shape of the models that benchmarks make with random weights."""

from __future__ import annotations

from transformers import Qwen3Config


def qwen3_shape(
    layers: int, heads: int, head_size: int, *, feed_forward: int = 3, vocab: int = 4096, tied: bool = False
) -> Qwen3Config:
    """Return a Qwen3 of width heads * head_size, with half as many heads for keys and values.

    Args:
        layers, heads, head_size: of its attention.
        feed_forward: times as wide as the residual stream.
        vocab: token ids.
        tied: embedding and head are one matrix.
    """
    width = heads * head_size
    return Qwen3Config(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=head_size,
        hidden_size=width,
        intermediate_size=feed_forward * width,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )
