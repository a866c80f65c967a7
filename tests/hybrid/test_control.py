"""The control of a windowed student: its teacher with attention cut to the windows, against masks by hand."""

import pytest
import torch
from hybrid_cases import VOCAB, logits, packed, teacher

from rwkvinside.data.batch import Batch
from rwkvinside.hybrid.document_attention import Window, cut_to_windows, document_attention, windows_of
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.teacher.signals import TeacherModel


def padded(lengths, T=24):
    """One document a row, padding behind it."""
    g = torch.Generator().manual_seed(1)
    real = torch.arange(T) < torch.tensor(lengths)[:, None]
    ids = torch.randint(0, VOCAB, real.shape, generator=g) * real
    positions = torch.arange(T).expand(len(lengths), -1) * real
    return Batch(ids, torch.where(real, ids, -100), positions, real.int(), tuple(range(len(lengths))))


def seen(batch, window, sinks):
    """(B, 1, T, T) additive mask, by the words of the definition; padding sees itself."""
    segments, positions = batch.segment_ids, batch.position_ids
    B, T = segments.shape
    mask = torch.full((B, 1, T, T), -torch.inf, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for j in range(t + 1):
                same = segments[b, t] == segments[b, j] > 0
                near = window is None or t - window < j or positions[b, j] < sinks
                if same and near or j == t:
                    mask[b, 0, t, j] = 0
    return mask


def by_hand(lm, batch, windows):
    """Logits of a model with a dense mask in every layer; transformers' "eager" would round scores to fp32."""
    lm.set_attn_implementation("sdpa")

    def masked(layer):
        mask = seen(batch, *windows.get(layer, (None, 0)))
        return lambda module, args, kwargs: (args, kwargs | {"attention_mask": mask})

    for i, layer in enumerate(lm.model.layers):
        layer.self_attn.register_forward_pre_hook(masked(i), with_kwargs=True)
    with torch.no_grad():
        return lm(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits


BATCHES = {"packed": packed([9, 1, 14, 4], rows=2), "padded": padded([24, 7, 1, 20]), "whole": packed([30])}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_control_is_the_teacher_behind_dense_masks(family, batch):
    spec = StudentConfig(window=5, sinks=2, attention_layers=(1,))
    wanted = by_hand(teacher(family).double(), batch, {0: (5, 2), 2: (5, 2)})[batch.mask]
    hybrid = HybridModel.from_teacher(teacher(family), spec).double()
    close = 1e-5 if family == "qwen3" else 1e-10  # Qwen3's own norms of queries and keys are computed in fp32
    found = logits(hybrid, batch, "control")[batch.mask]
    torch.testing.assert_close(found, wanted, rtol=0, atol=close)
    assert not torch.allclose(found, logits(hybrid, batch, "teacher")[batch.mask], atol=1e-3)

    alone = TeacherModel(teacher(family).double())  # the same by a model without mixers
    with torch.no_grad(), cut_to_windows(alone.lm, {0: Window(5, 2), 2: Window(5, 2)}):
        cut = alone.head(alone(batch))
    torch.testing.assert_close(cut[batch.mask], wanted, rtol=0, atol=close)
    with torch.no_grad():
        whole = alone.head(alone(batch))
    assert torch.equal(whole[batch.mask], logits(hybrid, batch, "teacher")[batch.mask]), "the cut is taken back"


@pytest.mark.parametrize("window_mix", ["sum", "softmax"])
def test_the_control_is_what_is_left_of_a_student_without_its_recurrences(window_mix):
    spec = StudentConfig(window=6, sinks=1, window_mix=window_mix)
    hybrid = HybridModel.from_teacher(teacher("llama"), spec).double()
    for mixer in hybrid.mixers.values():
        if window_mix == "sum":
            mixer.mix_recurrence.data.zero_()
            mixer.mix_window.data.fill_(1)
        else:
            mixer.far_bias.data.fill_(-100)
    batch = packed([20, 9])
    found = logits(hybrid, batch, "student")
    torch.testing.assert_close(found, logits(hybrid, batch, "control"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_kept_attention_is_cut_in_student_and_control_and_whole_in_the_teacher(batch):
    spec = StudentConfig(window=5, sinks=2, attention_layers=(1,), attention_window=3, attention_sinks=1)
    hybrid = HybridModel.from_teacher(teacher("llama"), spec).double()
    wanted = by_hand(teacher("llama").double(), batch, {0: (5, 2), 1: (3, 1), 2: (5, 2)})[batch.mask]
    torch.testing.assert_close(logits(hybrid, batch, "control")[batch.mask], wanted, rtol=0, atol=1e-10)
    whole = HybridModel.from_teacher(teacher("llama"), StudentConfig(attention_layers=(1,))).double()
    assert torch.equal(logits(hybrid, batch, "teacher"), logits(whole, batch, "teacher"))

    hybrid = HybridModel.from_teacher(teacher("llama"), spec.model_copy(update={"attention_layers": (0, 1)})).double()
    layer, seen_by = hybrid.lm.model.layers[0], {}
    layer.register_forward_hook(lambda module, args, output: seen_by.update(student=output))
    logits(hybrid, batch, "student")
    student = seen_by["student"]
    logits(hybrid, batch, "control")
    assert torch.equal(student, seen_by["student"])
    logits(hybrid, batch, "teacher")
    assert not torch.allclose(student[batch.mask], seen_by["student"][batch.mask], atol=1e-6)


def test_the_soft_cap_of_scores_stays_where_attention_is_cut():
    """Gemma 2's control and its cut layers, by its own scores under a mask by hand."""
    batch = packed([9, 14])
    hybrid = HybridModel.from_teacher(
        teacher("gemma2", sliding_window=40), StudentConfig(attention_layers=(1,), attention_window=4, window=4)
    ).double()
    lm = teacher("gemma2", sliding_window=40).double()
    lm.set_attn_implementation("eager")
    mask = seen(batch, 4, 0)
    for layer in lm.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
        )
    with torch.no_grad():
        wanted = lm(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    found = logits(hybrid, batch, "control")
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)  # "eager" has its softmax in fp32


def test_scores_that_grow_are_the_students_alone():
    """Queries of kept layers times log_a(position + a), by hand in every document; teacher and control as they were."""
    batch, base = packed([9, 14]), 4.0
    spec = StudentConfig(attention_layers=(0,), attention_log_base=base, window=3)
    hybrid = HybridModel.from_teacher(teacher("llama"), spec).double()
    plain = HybridModel.from_teacher(teacher("llama"), spec.model_copy(update={"attention_log_base": None})).double()
    for mode in ("teacher", "control"):
        assert torch.equal(logits(hybrid, batch, mode), logits(plain, batch, mode))
    assert not torch.allclose(logits(hybrid, batch, "student"), logits(plain, batch, "student"), atol=1e-3)
    factor = ((batch.position_ids.double() + base).log() / torch.tensor(base).double().log())[..., None]
    assert factor[0, [0, 9]].flatten().tolist() == [1, 1]  # first tokens of both documents
    scaled = plain.lm.model.layers[0].self_attn.q_proj
    scaled.register_forward_hook(lambda module, args, output: output * factor)  # before a rotation, which turns only
    torch.testing.assert_close(logits(hybrid, batch, "student"), logits(plain, batch, "student"), rtol=0, atol=1e-12)


def test_a_control_has_no_gradient():
    hybrid = HybridModel.from_teacher(teacher(), StudentConfig(window=6))
    hybrid.set_trainable(["mixer", "embed"])
    assert not hybrid(packed([9]), mode="control").requires_grad


def test_scores_keep_their_scale():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 30, 8, generator=g, dtype=torch.float64) for _ in range(3))
    batch = packed([20, 10], rows=2)
    scores = 0.7 * q @ k.mT + seen(batch, 6, 1)
    found, _ = document_attention(
        torch.nn.Module(), q, k, v, None, scaling=0.7, documents=batch.documents, window=Window(6, 1)
    )
    torch.testing.assert_close(found, (scores.softmax(-1) @ v).transpose(1, 2), rtol=0, atol=1e-12)


def test_a_layer_without_a_window_adds_nothing():
    q = torch.randn(1, 4, 9, 8)
    out, _ = document_attention(torch.nn.Module(), q, q, q, None, documents=packed([9]).documents, window=Window(0, 0))
    assert out.shape == (1, 9, 4, 8) and not out.any()


def test_a_window_needs_documents():
    q = torch.randn(1, 4, 9, 8)
    with pytest.raises(ValueError, match="within documents only"):
        document_attention(torch.nn.Module(), q, q, q, None, window=Window(4, 0))


def test_windows_of_mixers():
    def windows(**fields):
        return windows_of(HybridModel.from_teacher(teacher(), StudentConfig(**fields)).mixer_configs)

    assert windows() == {}
    assert windows(window=4, sinks=1, attention_layers=(1,)) == {0: Window(4, 1), 2: Window(4, 1)}
