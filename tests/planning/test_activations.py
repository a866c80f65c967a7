"""What the plan says a backward pass keeps, next to what autograd really keeps."""

import pytest
import torch
from kept_activations import SIZES, kept_by_autograd, left_in_memory, student
from plans import layer_spec

from rwkvinside import kernels
from rwkvinside.hybrid.settings import AdapterConfig
from rwkvinside.planning.activations import edge_bytes, kept_bytes, recomputed_bytes

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
        ("align", ["mixer"], False, {"window": 16, "sinks": 4, "window_mix": "sum"}),
        ("distill", ["mixer"], True, {"window": 32, "sinks": 4, "preset": "cxa078"}),
        ("distill", [".*"], False, {}),
        ("distill", [".*"], True, {}),
        ("distill", [".*"], False, {"family": "llama", "kept": (0, 2)}),
        ("distill", [".*"], False, {"family": "llama", "kept": (0, 2), "attention_window": 32, "attention_sinks": 4}),
        ("distill", [".*"], True, {"family": "llama", "kept": (1, 2), "attention_window": 64}),
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
    found = kept_by_autograd(model, align=align, bf16=bf16)
    assert expected == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("low, stream", [(2, 4), (4, 4), (2, 2)])
def test_fused_norms_keep_their_input_and_fused_mlps_no_silu(low, stream):
    """The sum of a step is compared with a GPU's peak by `rwkvinside bench gpu` (docs/benchmarks.md: within 1 %)."""
    model = student(family="llama")
    model.set_trainable([".*"])
    plain, fused = (kept_bytes(model, align=False, low=low, stream=stream, fused_layers=f) for f in (False, True))
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    # two norms: fp32 copies of their inputs, and the normed values for their weights
    assert [a - b for a, b in zip(plain, fused, strict=True)] == [2 * 4 * width + low * inner] * len(plain)
    assert kept_bytes(model, align=True, low=low, stream=stream, fused_layers=True) == kept_bytes(
        model, align=True, low=low, stream=stream
    )


@pytest.mark.skipif(kernels.why_unavailable("native") is not None, reason="the counts are those of the native kernel")
@pytest.mark.parametrize(
    "bf16, made",
    [
        (False, {}),
        (True, {}),
        (True, {"family": "llama", "dtype": torch.bfloat16, "window": 16, "sinks": 4}),
        (False, {"preset": "rad", "window": 32}),
        (False, {"preset": "hxa07b"}),
        (False, {"preset": "x070", "family": "llama"}),
    ],
)
def test_what_is_kept_where_the_recurrence_is_computed_again(bf16, made):
    """What only waits to be used again is in no graph: it is seen in memory."""
    model = student(**made)
    model.set_trainable(["mixer"])
    options = {"low": 2 if bf16 else 4, "stream": 2 if made.get("dtype") == torch.bfloat16 else 4}
    whole, again = (sum(kept_bytes(model, align=True, recurrence=kept, **options)) for kept in (True, False))
    assert left_in_memory(model, align=True, bf16=bf16) == pytest.approx(whole, rel=0.03)
    assert left_in_memory(model, align=True, bf16=bf16, recompute="recurrence") == pytest.approx(
        again, rel=0.02 if not bf16 else 0.07
    )
    assert again < 0.62 * whole
    most = recomputed_bytes(model, low=options["low"], stream=options["stream"], fused=False)
    assert (whole - again) / len(model.mixers) <= most <= 1.1 * (whole - again) / len(model.mixers)


@pytest.mark.parametrize("mode", ["align", "distill"])
def test_layers_that_are_recomputed_keep_their_input(mode):
    model = student()
    align = mode == "align"
    model.set_trainable(["mixer"] if align else [".*"])
    found = kept_by_autograd(model, align=align, bf16=False, recompute="mixers" if align else "layers")
    each, _ = edge_bytes(model, align=align, checkpointing=True, stream=4)
    assert len(model.lm.model.layers) * each + (0 if align else 8 * SIZES["hidden_size"]) == pytest.approx(
        found, rel=0.05
    )
