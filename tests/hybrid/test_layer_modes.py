"""Modes of single layers: a student that keeps some attention, without building it, equals the one that is built."""

import copy

import pytest
import torch
from hybrid_cases import logits, packed, teacher

from rwkvinside.hybrid.lm_head import Logits
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig

KEPT = {"attention_rope": False, "attention_log_base": 8.0, "attention_window": 6, "attention_sinks": 1}


def student(lm=None, attention_layers=(), **spec):
    """A student whose mixers differ from their start, all-RWKV unless layers are given."""
    config = StudentConfig(**spec, attention_layers=(0,)).model_copy(update={"attention_layers": attention_layers})
    model = HybridModel.from_teacher(lm or teacher(), config).double().eval()
    torch.manual_seed(1)
    for mixer in model.mixers.values():
        for parameter in mixer.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def with_layers(model, batch, layers, mode="student"):
    return model(batch, mode, Logits(), layers=layers)


@pytest.mark.parametrize("spec", [{}, {"attention_rope": False}, {"window": 4, "sinks": 1}, {"preset": "x070"}, KEPT])
@pytest.mark.parametrize("kept", [(1,), (0,), (0, 1), (2,)])
def test_kept_layers_equal_the_student_that_is_built_with_them(spec, kept):
    lm = teacher("llama", num_key_value_heads=4) if "preset" in spec else teacher()  # without norms of queries and keys
    base = student(copy.deepcopy(lm), **spec)
    batch = packed([9, 1, 20], rows=2)
    by_mode = with_layers(base, batch, dict.fromkeys(kept, "kept"))
    everything = logits(base, batch, "student")
    assert not torch.allclose(by_mode, everything, atol=1e-4)
    teacher_logits = logits(base, batch, "teacher")

    built = copy.deepcopy(base)
    built.keep_attention(kept)
    assert built.rwkv_layers == [i for i in range(3) if i not in kept]
    torch.testing.assert_close(logits(built, batch, "student"), by_mode, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits(built, batch, "teacher"), teacher_logits, rtol=0, atol=0)

    fresh = student(lm, **spec, attention_layers=kept)
    fresh.load_student_state_dict(built.student_state_dict())
    assert fresh.trained == built.trained and fresh.spec == built.spec
    torch.testing.assert_close(logits(fresh, batch, "student"), by_mode, rtol=0, atol=1e-10)


def test_swapped_layers_and_all_kept_are_the_teacher():
    model, batch = student(attention_rope=False), packed([9, 1, 20], rows=2)
    expected = logits(model, batch, "teacher")
    every = dict.fromkeys(range(3), "teacher")
    torch.testing.assert_close(with_layers(model, batch, every), expected, rtol=0, atol=0)
    swapped = with_layers(model, batch, {1: "student"}, mode="teacher")
    assert not torch.allclose(swapped, expected, atol=1e-4)
    torch.testing.assert_close(swapped, with_layers(model, batch, every | {1: "student"}), rtol=0, atol=0)
