"""Small random hybrids, and greedy generation by every way of reaching a token, for any hybrid model."""

import torch

from rwkvinside.modeling.mixer_presets import TimeMixerConfig
from rwkvinside.modeling.registry import hybrid_class

NEW = 12
LAYERS, HEADS, KV_HEADS, HEAD_SIZE, WIDTH, VOCAB = 4, 4, 2, 16, 48, 101
LAYOUTS = {"all-rwkv": [0, 1, 2, 3], "mixed": [0, 2], "attention-first": [1, 2]}


def build(family="qwen3", rwkv_layers=(0, 2), preset="cxa079", dtype=torch.float64, mixer=None, **config_fields):
    """A random hybrid whose every mixer parameter matters: the zeros of the usual start are perturbed."""
    torch.manual_seed(0)
    mixer_config = TimeMixerConfig.from_preset(
        preset,
        qk_norm=family == "qwen3",
        hidden_size=WIDTH,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        qkv_bias=family == "qwen2",
        **(mixer or {}),
    )
    model_class = hybrid_class(f"hybrid_{family}")
    config = model_class.config_class(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        rwkv_layers=list(rwkv_layers),
        mixer=mixer_config.to_dict(),
        rwkv_architecture=preset,
        **config_fields,
    )
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".self_attn." in name and int(name.split(".")[2]) in rwkv_layers and p.ndim > 1:
                p += 0.2 * torch.randn_like(p)
    return model


def greedy(model, ids, new=NEW, **kwargs):
    return model.generate(ids, max_new_tokens=new, do_sample=False, **kwargs)[:, -new:]


PADDED = ({}, {"prefill_chunk_size": 1}, {"use_cache": False}, {"prefill_chunk_size": 6})


def check_paths(model, prompt, new=NEW, chunks=(1, 5, 16), padded_ways=PADDED):
    """Greedy tokens with cache = without = in chunks = from left-padded rows = continued from a returned cache."""
    expected = greedy(model, prompt, new, use_cache=False)
    assert expected.unique().numel() > new // 4, "a model that repeats one token would pass anything"
    assert torch.equal(greedy(model, prompt, new), expected)
    for chunk in chunks:
        assert torch.equal(greedy(model, prompt, new, prefill_chunk_size=chunk), expected), (
            f"prefill in chunks of {chunk}"
        )

    short = prompt[:1, 8:]
    alone = greedy(model, short, new)
    padded = torch.cat([torch.cat([torch.zeros(1, 8, dtype=torch.long), short], 1), prompt[1:]])
    mask = torch.ones_like(padded)
    mask[0, :8] = 0
    both = torch.cat([alone, expected[1:]])
    for kwargs in padded_ways:
        assert torch.equal(greedy(model, padded, new, attention_mask=mask, **kwargs), both), f"left padding, {kwargs}"

    first = model.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    again = model.generate(
        first.sequences,
        attention_mask=torch.ones_like(first.sequences),  # generate() would take a generated token 0 for padding
        past_key_values=first.past_key_values,
        max_new_tokens=new - 5,
        do_sample=False,
    )
    assert torch.equal(again[:, -new:], expected), "continued from the returned cache"
