"""Attention within documents equals attention by a mask, and makes none; what runs on a GPU asks it nothing."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hybrid_cases import VOCAB, attention_mask_4d, batch_of, doubled, packed, teacher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from rwkvinside.data.batch import Batch
from rwkvinside.families.registry import FAMILIES
from rwkvinside.hybrid import document_attention as document_attention_module
from rwkvinside.hybrid.document_attention import attend_within_documents, document_attention
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.modeling import time_mixer
from rwkvinside.teacher.signals import TeacherModel

ROOT = Path(__file__).resolve().parents[2]


class Attention(torch.nn.Module):
    """What an attention function reads of its layer."""

    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def rows_of(segments):
    segments = torch.tensor(segments, dtype=torch.int32)
    ids = torch.zeros(segments.shape, dtype=torch.long)
    return Batch(ids, ids, ids, segments, tuple(range(len(segments))))


def projections(B, T, H, G, N=8, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, n, T, N, generator=g).to(device, dtype).requires_grad_() for n in (H, G, G)]


PACKED = [[1, 1, 1, 2, 2, 3], [1, 2, 2, 2, 2, 2]]
LAYOUTS = {
    "packed": PACKED,
    "whole": [[1] * 6, [1] * 6],
    "padded": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]],
    "padded on the left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "packed and padded": [[1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 2]],
}


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_equals_attention_by_a_mask(layout, dtype, atol, kv_heads):
    batch, layer = rows_of(LAYOUTS[layout]), Attention(4 // kv_heads)
    found = projections(2, 6, 4, kv_heads, dtype=dtype)
    wanted = projections(2, 6, 4, kv_heads, dtype=dtype)
    y, _ = document_attention(layer, *found, None, scaling=0.3, documents=batch.documents)
    reference, _ = sdpa_attention_forward(layer, *wanted, attention_mask_4d(batch), scaling=0.3)
    assert y.shape == reference.shape == (2, 6, 4, 8) and y.isfinite().all()  # padding too: it is multiplied by 0
    real = batch.mask[:, :, None, None]
    torch.testing.assert_close(y * real, reference * real, rtol=0, atol=atol)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype) * real
    for x, z in zip(*(torch.autograd.grad(o, i, cotangent) for o, i in ((y, found), (reference, wanted))), strict=True):
        torch.testing.assert_close(x, z, rtol=0, atol=4 * atol)


def test_products_follow_autocast():
    queries = projections(2, 6, 4, 2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = document_attention(Attention(2), *queries, None, documents=rows_of(PACKED).documents)
    assert y.dtype == torch.bfloat16


def test_dropout_drops():
    queries, documents = projections(2, 6, 4, 2), rows_of(PACKED).documents
    outputs = [document_attention(Attention(2), *queries, None, dropout=p, documents=documents)[0] for p in (0.0, 0.5)]
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


@pytest.mark.parametrize("queries", [2, 512])  # of a block
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_and_caps_equal_attention_by_a_mask(layout, window, softcap, queries, monkeypatch):
    """The reference is the attention of the teachers that have both: "eager" of Gemma 2."""
    monkeypatch.setattr(document_attention_module, "QUERIES", queries)
    batch, layer = rows_of(LAYOUTS[layout]), Attention(2)
    found, wanted = projections(2, 6, 4, 2), projections(2, 6, 4, 2)
    options = {"scaling": 0.3, "softcap": softcap}
    y, _ = document_attention(layer, *found, None, documents=batch.documents, sliding_window=window, **options)
    allowed = attention_mask_4d(batch)
    if window is not None:
        allowed &= ~torch.ones(6, 6, dtype=torch.bool).tril(-window)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    reference, _ = eager_attention_forward(layer, *wanted, mask, **options)
    real = batch.mask[:, :, None, None]
    atol = 1e-6  # "eager" has its softmax in fp32
    torch.testing.assert_close(y * real, reference * real, rtol=0, atol=atol)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) * real
    for x, z in zip(*(torch.autograd.grad(o, i, cotangent) for o, i in ((y, found), (reference, wanted))), strict=True):
        torch.testing.assert_close(x, z, rtol=0, atol=4 * atol)


def test_a_window_needs_no_mask_of_a_whole_row():
    T = 4096
    batch = rows_of([[1] * T])
    with Largest() as largest, torch.no_grad():
        document_attention(Attention(1), *projections(1, T, 1, 1), None, documents=batch.documents, sliding_window=256)
    assert 0 < largest.elements < T * T / 16, largest.elements


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_packed_documents_equal_the_documents_alone(family, kv_heads, dtype, atol):
    """Outputs and every gradient of a student that keeps an attention layer, and the outputs of its teacher."""
    lm = teacher(family, num_key_value_heads=kv_heads)
    atol = max(atol, 1e-7) if family.startswith("gemma") else atol  # gradients of its norms add up in fp32
    lm = doubled(lm) if dtype == torch.float64 else lm
    model = HybridModel.from_teacher(lm, StudentConfig(attention_layers=(1,))).to(dtype)
    model.set_trainable([".*"])
    lengths = [7, 1, 12]
    batch = packed(lengths, rows=2)
    weights = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    documents = list(
        zip(
            (d for row in batch.input_ids for d in row.split(lengths)),
            (w for row in weights for w in row.split(lengths)),
            strict=True,
        )
    )
    for mode in ("teacher", "student"):
        together = model(batch, mode=mode)
        alone = [model(batch_of(ids[None]), mode=mode)[0] for ids, _ in documents]
        torch.testing.assert_close(together.flatten(0, 1), torch.cat(alone), rtol=0, atol=atol)
    names, parameters = zip(*((n, p) for n, p in model.canonical_parameters().items() if p.requires_grad), strict=True)
    gradients = [
        torch.autograd.grad(loss, parameters, allow_unused=True)
        for loss in (
            (together * weights).sum(),
            sum((y * w).sum() for y, (_, w) in zip(alone, documents, strict=True)),
        )
    ]
    used = 0
    for name, x, y in zip(names, *gradients, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            used += bool(x.any())
            size = 1 + y.abs().max().item()
            torch.testing.assert_close(x, y, rtol=0, atol=10 * atol * size, msg=lambda m, name=name: f"{name}: {m}")
    assert used > 40


class Largest(TorchDispatchMode):
    """Notes the most elements that any operator has put out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("kept", [(), (1,)])
def test_no_tensor_has_the_size_of_a_mask(kept):
    T = 512
    batch = packed([100, 212, 200])
    assert batch.input_ids.shape == (1, T)
    lm = teacher(max_position_embeddings=T)
    with Largest() as by_mask:
        lm.model(input_ids=batch.input_ids, attention_mask=attention_mask_4d(batch))
    assert by_mask.elements >= T * T  # it would be seen
    with Largest() as largest:
        TeacherModel(lm)(batch)
        model = HybridModel.from_teacher(lm, StudentConfig(attention_layers=kept))
        model.set_trainable([".*"])
        sum(error for error, _ in model(batch, mode="align").values()).backward()
        model(batch, mode="teacher")
        model(batch).sum().backward()
    assert 0 < largest.elements < T * T / 2, largest.elements


@pytest.mark.parametrize("family", FAMILIES)
def test_called_in_another_way_a_model_attends_as_before(family):
    plain, ours = doubled(teacher(family)), attend_within_documents(doubled(teacher(family)))
    documents = attention_mask_4d(packed([4, 6], rows=2))
    if plain.config._attn_implementation == "eager":  # which adds its masks
        documents = torch.zeros(documents.shape).masked_fill(~documents, torch.finfo(torch.float32).min)
    ids = torch.randint(0, VOCAB, (2, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = torch.cat([torch.arange(4), torch.arange(6)]).expand(2, -1)
    for call in (
        dict(),
        dict(attention_mask=mask),
        dict(position_ids=positions, use_cache=False),
        dict(attention_mask=documents),
    ):
        found, wanted = ours(ids, **call).logits, plain(ids, **call).logits
        # "eager" in float64 gives padding that sees nothing NaN
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    generated = [
        lm.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0) for lm in (ours, plain)
    ]
    assert torch.equal(*generated)


def test_the_implementation_is_not_written_down(tmp_path):
    attend_within_documents(teacher()).config.save_pretrained(tmp_path)
    assert "documents" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("layout, window", [("packed", None), ("packed", 3), ("whole", 3)])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_on_a_gpu_it_is_flash_attention_over_sequences(monkeypatch, kv_heads, layout, window):
    called, varlen_attn = [], document_attention_module.varlen_attn

    def spy(*args, **options):
        called.append((args, options))
        return varlen_attn(*args, **options)

    monkeypatch.setattr(document_attention_module, "varlen_attn", spy)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    documents = rows_of(LAYOUTS[layout]).documents
    with FakeTensorMode(), torch.device("cuda"):  # a GPU that is not there: shapes only
        documents = replace(documents, cu_seqlens=torch.empty(len(documents.cu_seqlens), dtype=torch.int32))
        queries = [torch.empty(2, n, 6, 16, dtype=torch.bfloat16) for n in (4, kv_heads, kv_heads)]
        y, _ = document_attention(
            Attention(4 // kv_heads), *queries, None, scaling=0.25, documents=documents, sliding_window=window
        )
    assert y.shape == (2, 6, 4, 16) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
    (((query, key, value, *bounds), options),) = called
    assert query.shape == (12, 4, 16) and key.shape == value.shape == (12, kv_heads, 16)
    assert bounds[0] is bounds[1] is documents.cu_seqlens and bounds[2:] == [documents.longest] * 2
    shared = {} if kv_heads == 4 else {"enable_gqa": True}  # of the PyTorch that is pinned here
    before = -1 if window is None else window - 1  # beside the token itself
    assert options == {"scale": 0.25, "window_size": (before, 0), **shared}


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_on_a_gpu_without_flash_attention_heads_share_no_keys(monkeypatch, layout):
    """Kernels that take fp32 want as many keys as queries; PyTorch's way around them holds all scores."""
    called = []

    def spy(query, key, value, **options):
        called.append((query.shape, key.shape, options["enable_gqa"]))
        return torch.empty_like(query)

    documents = rows_of(LAYOUTS[layout]).documents
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with FakeTensorMode(), torch.device("cuda"):
        queries = [torch.empty(2, n, 6, 16) for n in (4, 2, 2)]
        y, _ = document_attention(Attention(2), *queries, None, documents=documents)
    assert y.shape == (2, 6, 4, 16) and len(called) == (1 if layout == "padded" else 5)
    assert all(query == key and not shared for query, key, shared in called)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_forward_asks_the_device_for_a_value(monkeypatch, layout):
    """On the meta device there are none: whoever looks at one fails."""
    spec = StudentConfig(attention_layers=(1,), preset="x070")  # with the token shift, which reads the bounds
    model = HybridModel.from_teacher(teacher("llama"), spec).to("meta")
    batch = rows_of(LAYOUTS[layout]).to("meta")

    def recurrence(r, log_decay, k, v, a, b, state=None, **options):  # (the kernel of a GPU is not there)
        return torch.empty_like(r), None

    monkeypatch.setattr(time_mixer, "wkv7", recurrence)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        bool((batch.segment_ids == 1).all())  # it would be noticed
    for mode in ("teacher", "student"):
        assert model(batch, mode=mode).shape == (2, 6, 32)
    assert model(batch, mode="align").keys() == {0, 2}


@pytest.mark.integration
def test_a_long_packed_row_takes_a_gibibyte_less():
    worker = ROOT / "tests" / "helpers" / "mask_memory_worker.py"
    result = subprocess.run(
        [sys.executable, str(worker)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    print(found)
    assert found["mask"] - found["documents"] >= 2**30 and found["documents"] < 2**28
