"""What the plan says a backward pass keeps, next to what autograd really keeps."""

import contextlib

import pytest
import torch
from plans import layer_spec
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rwkvinside import kernels
from rwkvinside.data.batch import Batch
from rwkvinside.hybrid.assemble import apply
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import AdapterConfig, StudentConfig
from rwkvinside.planning.activations import edge_bytes, kept_bytes

ROWS, TOKENS = 2, 256
SIZES = dict(
    hidden_size=96,
    intermediate_size=272,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=131,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
FAMILIES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def student(family="qwen3", preset="cxa079", kept=(), dtype=torch.float32, layers=None, **fields):
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    teacher = model(config(**SIZES)).to(dtype)
    hybrid = HybridModel.from_teacher(teacher, StudentConfig(preset=preset, attention_layers=kept, **fields))
    if layers is not None:
        apply(hybrid, layers)
    return hybrid


def batch():
    ids = torch.randint(0, 131, (ROWS, TOKENS))
    segments = torch.ones_like(ids, dtype=torch.int32)
    segments[:, 128:] = 2
    positions = torch.arange(TOKENS).remainder(128).expand_as(ids)
    return Batch(ids, ids, positions, segments, tuple(range(ROWS)))


def kept_by_autograd(model, *, align, bf16, checkpointing):
    """Bytes a token of everything that the graph of one forward holds, parameters and their casts left out."""
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        # what scales with the tokens; casts of weights do not
        if storage.data_ptr() not in ours and tensor.numel() >= ROWS * TOKENS:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address comes twice
        return tensor

    weights = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    context = torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()
    with context, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        if align:
            model(batch(), mode="align", checkpoint=checkpointing)
        else:
            if checkpointing:
                model.lm.train().activation_checkpointing_enable()
            model(batch(), mode="student")
    return sum(n for n, t in found.values() if tuple(t.shape) not in weights) / (ROWS * TOKENS)


LORA = layer_spec(adapters=(AdapterConfig(rank=8),))
QUANTIZED = layer_spec(("mlp", "teacher"), adapters=(AdapterConfig(rank=8),))


@pytest.mark.skipif(kernels.why_unavailable("native") is not None, reason="the counts are those of the native kernel")
@pytest.mark.parametrize(
    "mode, train, bf16, made",
    [
        ("align", ["mixer"], False, {}),
        ("align", ["mixer"], True, {}),
        ("align", ["mixer"], False, {"family": "llama"}),
        ("align", ["mixer"], True, {"family": "llama", "dtype": torch.bfloat16}),
        ("align", ["mixer"], False, {"preset": "rad", "kept": (1,)}),
        ("align", ["mixer"], False, {"family": "llama", "preset": "x070"}),
        ("align", ["mixer"], False, {"window": 16, "sinks": 4}),
        ("align", ["mixer"], False, {"window": 64, "preset": "rad"}),
        ("align", ["mixer"], True, {"window": 32, "sinks": 1, "family": "llama", "dtype": torch.bfloat16}),
        ("distill", ["mixer"], True, {"window": 32, "sinks": 4, "preset": "cxa078"}),
        ("distill", [".*"], False, {}),
        ("distill", [".*"], True, {}),
        ("distill", [".*"], False, {"family": "llama", "kept": (0, 2)}),
        ("distill", ["mixer"], False, {}),
        ("distill", ["mixer"], True, {"dtype": torch.bfloat16}),
        ("distill", ["mixer", "adapters"], False, {"layers": LORA}),
        ("distill", ["mixer", "adapters"], False, {"layers": QUANTIZED}),
        ("distill", ["mixer", "adapters"], True, {"layers": QUANTIZED, "dtype": torch.bfloat16}),
    ],
)
def test_activations_are_those_that_autograd_keeps(mode, train, bf16, made):
    model = student(**made)
    model.set_trainable(train)
    low = 2 if bf16 else 4
    stream = 2 if made.get("dtype") == torch.bfloat16 else 4
    align = mode == "align"
    expected = sum(kept_bytes(model, align=align, low=low, stream=stream))
    expected += 0 if align else 8 * SIZES["hidden_size"]  # the last norm
    found = kept_by_autograd(model, align=align, bf16=bf16, checkpointing=False)
    assert expected == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("mode", ["align", "distill"])
def test_layers_that_are_recomputed_keep_their_input(mode):
    model = student()
    align = mode == "align"
    model.set_trainable(["mixer"] if align else [".*"])
    found = kept_by_autograd(model, align=align, bf16=False, checkpointing=True)
    each, _ = edge_bytes(model, align=align, checkpointing=True, stream=4)
    assert len(model.lm.model.layers) * each + (0 if align else 8 * SIZES["hidden_size"]) == pytest.approx(
        found, rel=0.05
    )
