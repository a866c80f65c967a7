"""Small teachers of every family with packed batches, for tests of students."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rwkvinside.data.batch import Batch
from rwkvinside.hybrid.lm_head import Logits

VOCAB = 50

# What the published configurations of a family have beside the common fields of `teacher`: the quirks of its attention,
# its norms and its head. Windows are short and layers alternate early, so that three layers have all kinds.
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
QUIRKS = {
    "mistral": {"sliding_window": 6},
    "ministral": SLIDING,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.125,
        "residual_multiplier": 0.6,
        "logits_scaling": 8.0,
    },
    "phi3": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.75}},
    "qwen3_moe": {
        "mlp_only_layers": [1],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "gemma3_text": SLIDING | {"query_pre_attn_scalar": 24},
    "gemma2": SLIDING | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
}


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
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        | QUIRKS.get(family, {})
        | changes
    )
    config |= {name: config[name][:layers] for name in ("layer_types", "no_rope_layers") if name in config}
    if family in ("qwen2", "phi3"):  # which do not choose
        config.pop("head_dim")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases and norms away from their neutral start
            p.add_(0.3 * torch.randn_like(p) if p.ndim == 1 else 0.1 * torch.randn_like(p))
    return model


def doubled(model):
    """The model in float64, which the fast implementations of experts do not take."""
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")
    return model.double()


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
