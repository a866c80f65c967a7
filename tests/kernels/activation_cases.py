"""What the plan says a backward pass keeps on the Triton kernels, which are not launched, next to what autograd keeps.

Run by test_training_steps.py, or directly: TRITON_INTERPRET=1 python -m pytest tests/kernels/activation_cases.py
"""

from functools import partial

import pytest
import torch
from kept_activations import SIZES, kept_by_autograd, left_in_memory, student

from rwkvinside.hybrid import document_attention
from rwkvinside.kernels.gpu import mixer, op, squared_error, window
from rwkvinside.planning.activations import kept_bytes


@pytest.fixture(autouse=True)
def no_launches(monkeypatch):
    """What is kept does not depend on values, and the interpreter would take minutes to compute them."""
    for module in (op, mixer, squared_error, window):
        monkeypatch.setattr(module, "run", lambda launches, device: None)


@pytest.mark.parametrize(
    "mode, train, bf16, made",
    [
        ("align", ["mixer"], False, {}),
        ("align", ["mixer"], True, {}),
        ("align", ["mixer"], True, {"family": "llama", "dtype": torch.bfloat16}),
        ("align", ["mixer"], True, {"preset": "rad", "kept": (1,)}),
        ("align", ["mixer"], True, {"preset": "hxa07b"}),
        ("align", ["mixer"], True, {"family": "llama", "preset": "x070"}),
        ("align", ["mixer"], True, {"window": 32, "sinks": 4}),
        ("align", ["mixer"], False, {"window": 64, "preset": "rad"}),
        ("align", ["mixer"], True, {"window": 32, "window_mix": "sum"}),
        ("distill", [".*"], True, {}),
        ("distill", [".*"], False, {"kept": (0, 2)}),
        ("distill", ["mixer"], True, {"dtype": torch.bfloat16}),
        ("distill", [".*"], False, {"kept": (0, 2), "attention_window": 32, "attention_sinks": 4}),
        ("distill", ["mixer"], True, {"family": "llama", "kept": (1, 2), "attention_window": 64}),
    ],
)
def test_activations_are_those_that_autograd_keeps(monkeypatch, mode, train, bf16, made):
    # kept attention has no backend that can be named: on a GPU it is Triton's, here it is told so
    attend = partial(document_attention.window_attention, backend="triton")
    monkeypatch.setattr(document_attention, "window_attention", attend)
    model = student(backend="triton", **made)
    model.set_trainable(train)
    stream = 2 if made.get("dtype") == torch.bfloat16 else 4
    align = mode == "align"
    low = 2 if bf16 else 4
    expected = sum(kept_bytes(model, align=align, low=low, stream=stream, fused=True, fused_windows=True))
    expected += 0 if align else 8 * SIZES["hidden_size"]  # the last norm
    assert expected == pytest.approx(kept_by_autograd(model, align=align, bf16=bf16), rel=0.04)


@pytest.mark.parametrize("made", [{}, {"window": 32, "sinks": 4}, {"preset": "rad"}, {"preset": "x070"}])
@pytest.mark.parametrize("bf16", [True, False])
def test_what_is_kept_where_the_recurrence_is_computed_again(made, bf16):
    model = student(backend="triton", family="llama" if made.get("preset") == "x070" else "qwen3", **made)
    model.set_trainable(["mixer"])
    options = {"align": True, "low": 2 if bf16 else 4, "stream": 4, "fused": True}
    whole, again = (sum(kept_bytes(model, recurrence=kept, **options)) for kept in (True, False))
    # of which weights in bf16 are a part, the same in both
    measured = [left_in_memory(model, align=True, bf16=bf16, recompute=what) for what in (None, "recurrence")]
    assert whole - again == pytest.approx(measured[0] - measured[1], rel=0.04)
