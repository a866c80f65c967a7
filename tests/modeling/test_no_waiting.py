"""Inference reads no value of a tensor on the host, which on a GPU would wait for it in every layer.

On the meta device, where tensors have no values and a read raises. The attention of transformers is "eager": with
"sdpa" transformers itself looks once per forward whether a padding mask is all True.
"""

from contextlib import nullcontext

import pytest
import torch

from rwkvinside.modeling import wkv7 as door
from rwkvinside.modeling import wkv7_triton
from rwkvinside.modeling.mixer_presets import TimeMixerConfig
from rwkvinside.modeling.registry import hybrid_class

HEADS, KV_HEADS, HEAD_SIZE, WIDTH, VOCAB = 4, 2, 16, 48, 101


@pytest.fixture(autouse=True)
def _autocast_on_meta(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # knows no meta device


def build(rwkv_layers, **mixer):
    sizes = {"hidden_size": WIDTH, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_size": HEAD_SIZE}
    model_class = hybrid_class("hybrid_qwen3")
    config = model_class.config_class(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        rwkv_layers=rwkv_layers,
        mixer=TimeMixerConfig.from_preset("cxa079", qk_norm=True, **sizes, **mixer).to_dict(),
        attn_implementation="eager",
    )
    return model_class(config).eval()


def forward(rwkv_layers, padded, **mixer):
    """Run a prompt of two rows and a token after it; return the shape of its logits."""
    with torch.device("meta"), torch.no_grad():
        model = build(rwkv_layers, **mixer)
        ids, mask = torch.zeros(2, 40, dtype=torch.long), torch.ones(2, 41, dtype=torch.long)
        out = model(ids, attention_mask=mask[:, :40] if padded else None)
        mask = mask if padded else None
        return model(ids[:, :1], attention_mask=mask, past_key_values=out.past_key_values).logits.shape


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rwkv_layers", [[0, 1], [0], [1]])
def test_pytorch(rwkv_layers, padded):
    assert forward(rwkv_layers, padded) == (2, 1, VOCAB)


@pytest.mark.parametrize("padded", [False, True])
def test_the_carried_kernel(monkeypatch, padded):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda **arguments: None

    monkeypatch.setattr(door, "kernels", None)
    monkeypatch.setattr(door, "_carried_unavailable", lambda *properties: None)
    monkeypatch.setattr(wkv7_triton, "_step", Kernel())
    assert forward([0, 1], padded, backend="triton") == (2, 1, VOCAB)
    assert grids == [(2 * HEADS,)] * 4, "two layers, a prompt and a token"


def test_a_read_is_noticed():
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.ones(2, device="meta").all())


def test_values_are_checked_on_a_cpu():
    x = [torch.full((1, 5, 2, 16), -6.0) for _ in range(6)]
    with pytest.raises(ValueError, match="clamp it"):
        door.wkv7(*x, backend="chunked")
