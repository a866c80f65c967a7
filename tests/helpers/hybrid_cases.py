"""Small teachers of every family with packed batches, for tests of students."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rwkvinside.data.batch import Batch
from rwkvinside.hybrid.lm_head import Logits

VOCAB = 50


def teacher(family="qwen3", layers=3, **changes):
    torch.manual_seed(0)
    config = (
        dict(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=48,
            vocab_size=VOCAB,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
        | changes
    )
    kinds = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    if family == "qwen2":
        config.pop("head_dim")
    make_config, make_model = kinds[family]
    model = make_model(make_config(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases and norms away from their neutral start
            p.add_(0.3 * torch.randn_like(p) if p.ndim == 1 else 0.1 * torch.randn_like(p))
    return model


def packed(documents, rows=1, seed=3):
    """Rows that hold the same document lengths, one after the other."""
    length = sum(documents)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length), generator=g)
    segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(documents)])
    positions = torch.cat([torch.arange(n) for n in documents])
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = torch.where(segments[1:] == segments[:-1], ids[:, 1:], -100)
    return Batch(
        ids, labels, positions.expand(rows, -1).clone(), segments.int().expand(rows, -1).clone(), tuple(range(rows))
    )


def attention_mask_4d(batch):
    """(B, 1, T, T) bool, True = may attend: causally within the same document; padding only to itself."""
    T = batch.input_ids.shape[1]
    same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    allowed = same & torch.ones(T, T, dtype=torch.bool).tril() & batch.mask[:, :, None]
    return (allowed | torch.eye(T, dtype=torch.bool))[:, None]


def logits(model, batch, mode):
    return model(batch, mode=mode, task=Logits())


def batch_of(document):
    n = document.shape[1]
    ones = torch.ones_like(document)
    return Batch(document, document, torch.arange(n)[None].expand_as(document), ones.int(), (0,))
