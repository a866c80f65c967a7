"""Exports for MLX: what mlx-lm computes of them, its batches, caches and quantization, and what is refused."""

import json
import os
import re
import shutil
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from finished_run import save_run
from hybrid_cases import teacher
from tiny import byte_tokenizer, save_texts

from rwkvinside.errors import UserError, VerificationError
from rwkvinside.export.limits import reasons_against
from rwkvinside.export.manifest import digests
from rwkvinside.export.mlx import limits
from rwkvinside.export.probe import batch_of, student_logits
from rwkvinside.export.registry import export, verify
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.modeling.mixer_presets import PRESETS
from rwkvinside.modeling.wkv7 import wkv7
from rwkvinside.runs.trained import open_run
from rwkvinside.support.sealed import sealed_text, unsealed

os.environ["MLX_ENABLE_TF32"] = "0"
mx = pytest.importorskip("mlx.core", reason="MLX is not installed, or not for this machine")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
hybrid_mlx = import_module("rwkvinside.modeling.mlx.hybrid_mlx")

WINDOW = {"window": 4, "sinks": 2, "window_mix": "softmax"}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def finished(folder, family="llama", student=None, **fields):
    teacher(family, vocab_size=264, **fields).save_pretrained(folder / "teacher")
    byte_tokenizer("<s>", "</s>").save_pretrained(folder / "teacher")
    return save_run(folder / "run", folder / "teacher", ("mixer", "mlp"), {"attention_layers": [1]} | (student or {}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("trained"), student=WINDOW)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("mlx") / "student"
    return out, export(run, out, "mlx")


def loaded(folder):
    return mlx_lm.load(str(folder), trust_remote_code=True)


# every family once, with what its attention or the mixers have: kept layers that slide, no rotation, other presets
@pytest.mark.parametrize(
    "family, student, fields",
    [
        ("llama", WINDOW | {"attention_rope": False}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        ("mistral", {"preset": "x070"}, {}),
        ("ministral", WINDOW | {"attention_layers": [2], "window_mix": "sum"}, {}),
        ("smollm3", {"preset": "hxa07b", "attention_layers": [2]}, {}),
        ("qwen2", {"preset": "cxa078", "attention_layers": []}, {"tie_word_embeddings": False}),
        ("qwen3", WINDOW | {"sinks": 0, "window": {0: 7, 1: 4}, "attention_layers": [2]}, {}),
        ("qwen3_moe", {"preset": "rad"}, {}),
        ("granite", {"output_scale": 0.5}, {"head_dim": 8}),
        ("phi3", WINDOW, {}),
        ("olmo2", {"preset": "arwkv7"}, {}),
        ("gemma2", WINDOW, {}),
        ("gemma3_text", WINDOW | {"attention_layers": [1]}, {}),
        ("glm4", WINDOW, {}),
        ("llama", {"preset": "hxa07a"}, {}),
        ("llama", {"preset": "hxa07c"}, {}),
        ("llama", {"preset": "cxa076r"}, {}),
        ("llama", {"preset": "hxa079", "key_scale": "log"}, {}),
    ],
)
def test_mlx_lm_computes_the_trained_model(tmp_path, family, student, fields):
    run = finished(tmp_path, family, student, **fields)
    result = export(run, tmp_path / "s", "mlx")["verification"]
    assert result["passed"] and result["max_difference"] < 1e-5 and result["validation_rows"] == 0
    assert verify(tmp_path / "s", run)["max_difference"] == result["max_difference"]


def test_all_families_and_presets_were_tried():
    (mark,) = (m for m in test_mlx_lm_computes_the_trained_model.pytestmark if m.name == "parametrize")
    families, students, _ = zip(*mark.args[1], strict=True)
    assert set(families) == set(limits.MODULES)
    assert {student.get("preset", "cxa079") for student in students} == set(PRESETS)


# attention that is kept slides, and rotates in every way, far beyond what an export is compared on
@pytest.mark.parametrize(
    "family, student, fields",
    [
        ("llama", WINDOW, {}),
        ("llama", {}, {"rope_parameters": LLAMA3}),
        ("qwen3", {}, {"rope_parameters": YARN | {"truncate": False}}),
        ("glm4", {}, {"rope_parameters": YARN | {"partial_rotary_factor": 0.5, "attention_factor": 1.3}}),
        ("ministral", {"attention_layers": [0, 2]}, {}),
        ("gemma3_text", {"attention_layers": [0, 1]}, {}),
        ("smollm3", {"attention_layers": [1, 2]}, {}),
    ],
)
def test_long_texts_in_one_pass_and_in_pieces(tmp_path, family, student, fields):
    run = finished(tmp_path, family, student, max_position_embeddings=2048, **fields)
    export(run, tmp_path / "s", "mlx")
    model, _ = loaded(tmp_path / "s")
    ids = torch.randint(264, (1, 1100), generator=torch.Generator().manual_seed(0))
    wanted = student_logits(open_run(run).load_model(), batch_of(ids))
    caches = model.make_cache()
    found = [np.array(model(mx.array(piece.numpy()), caches)) for piece in ids.split([700, 1, 33, 366], dim=1)]
    torch.testing.assert_close(torch.from_numpy(np.array(model(mx.array(ids.numpy())))), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(np.concatenate(found, 1)), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "family, student",
    [
        ("llama", WINDOW),
        ("mistral", {"preset": "x070"}),
        ("gemma2", WINDOW),
        ("gemma3_text", WINDOW | {"attention_layers": [0, 1]}),
        ("qwen3", {"attention_layers": []}),
    ],
)
def test_rows_of_a_batch_write_what_they_write_alone(tmp_path, family, student):
    export(finished(tmp_path, family, student), tmp_path / "s", "mlx")
    model, tokenizer = loaded(tmp_path / "s")
    tokenizer._eos_token_ids = set()
    prompts = [[5, 6, 7], [9], list(range(20, 49)), [8, 9] * 5]
    alone, caches = [model.make_cache() for _ in prompts], None
    for _ in range(2):  # the second time the caches of the first go on
        found = mlx_lm.batch_generate(
            model,
            tokenizer,
            prompts,
            prompt_caches=caches,
            max_tokens=7,
            return_prompt_caches=True,
            return_token_ids=True,
        )
        caches = found.caches
        for prompt, cache, tokens in zip(prompts, alone, found.token_ids, strict=True):
            written = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=7, prompt_cache=cache)
            assert [response.token for response in written] == tokens


def test_caches_are_saved_and_go_on(exported, tmp_path):
    from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

    model, _ = loaded(exported[0])
    caches = model.make_cache()
    model(mx.array([[5, 6, 7, 8, 9, 10, 11]]), caches)
    save_prompt_cache(str(tmp_path / "prompt.safetensors"), caches)
    read = load_prompt_cache(str(tmp_path / "prompt.safetensors"))
    token = mx.array([[12]])
    assert mx.array_equal(model(token, caches), model(token, read))
    # a recurrent layer keeps as much of a long text as of a short one
    size = [cache.nbytes for cache in caches]
    model(mx.array([[5] * 300]), caches)
    assert [a == b.nbytes for a, b in zip(size, caches, strict=True)] == [True, False, True]


def test_gradients_reach_every_parameter_of_a_mixer(exported):
    from mlx.utils import tree_flatten

    model, _ = loaded(exported[0])
    loss = lambda m: m(mx.array([[5, 6, 7, 8, 9, 10, 11] * 6])).square().mean()  # noqa: E731
    gradients = dict(tree_flatten(mlx_lm.utils.nn.value_and_grad(model, loss)(model)[1]))
    of_mixer = {name: g for name, g in gradients.items() if name.startswith("model.layers.2.self_attn.")}
    assert len(of_mixer) > 20 and all(g.abs().max() > 0 and mx.isfinite(g).all() for g in of_mixer.values())


def test_the_rotation_does_not_train_and_layers_are_not_checkpointed(exported):
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.trainer import grad_checkpoint

    model, _ = loaded(exported[0])
    assert not any("wave" in name for name, _ in tree_flatten(model.trainable_parameters()))
    layer = type(model.layers[0])
    whole = layer.__call__
    try:
        grad_checkpoint(model.layers[0])
        with pytest.raises(ValueError, match="leave out --grad-checkpoint"):
            model(mx.array([[5, 6]]))
    finally:
        layer.__call__ = whole


def test_quantized_by_mlx_lm(run, tmp_path):
    fields = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
    export(finished(tmp_path, student=WINDOW, **fields), tmp_path / "s", "mlx", dtype="bfloat16")
    mlx_lm.convert(str(tmp_path / "s"), str(tmp_path / "q"), quantize=True, q_bits=8, trust_remote_code=True)
    (model, _), (smaller, _) = loaded(tmp_path / "s"), loaded(tmp_path / "q")
    assert type(smaller.layers[0].self_attn.key).__name__ == "QuantizedLinear"
    for mixer in (smaller.layers[0].self_attn, model.layers[2].self_attn):
        assert {mixer.w0.dtype, mixer.far_bias.dtype} == {mx.float32}
        assert mixer.w1.dtype == mx.bfloat16
    ids = mx.array([list(range(40))])
    exact, rounded = (m(ids).astype(mx.float32) for m in (model, smaller))
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("kind", ["of all kinds", "the same key again and again, nothing forgotten"])
@pytest.mark.parametrize("tokens", [1, 32, 77, 600])
def test_recurrence(tokens, kind):
    g = torch.Generator().manual_seed(0)
    r, k, v, w, kk, rate = torch.randn(6, 2, tokens, 3, 16, generator=g)
    log_decay = -0.6065 * torch.sigmoid(4 * w)
    if kind != "of all kinds":
        kk, rate, log_decay = kk[:, :1].expand_as(kk), torch.full_like(rate, 9.0), torch.full_like(w, -1e-4)
    kk = F.normalize(kk, dim=-1)
    inputs = (r, log_decay, k, v, -kk, kk * torch.sigmoid(rate))
    state = torch.randn(2, 3, 16, 16, generator=g)
    y, last = wkv7(*(x.double() for x in inputs), state.double())
    found, end = hybrid_mlx.wkv7([mx.array(x.transpose(1, 2).numpy()) for x in inputs], mx.array(state.numpy()))
    for ours, reference in ((found.swapaxes(1, 2), y), (end, last)):
        error = (torch.from_numpy(np.array(ours)) - reference).abs().max() / reference.abs().max()
        assert error < 2e-6


def test_record_and_card(exported, run):
    out, report = exported
    config, card = json.loads((out / "config.json").read_text()), (out / "README.md").read_text()
    assert config["model_file"] == "hybrid_mlx.py" and config["model_type"] == "llama"
    assert report["attention_layers"] == [1] and report["checkpoint"] == "step-00000002"
    assert "mlx_lm.generate --model student --trust-remote-code" in card and "library_name: mlx" in card
    assert str(run) not in (out / "conversion.json").read_text() and "/secret" not in (out / "config.json").read_text()


@pytest.mark.parametrize(
    "family, fields, student, reason",
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, {}, "rotation is of type dynamic"),
        ("llama", {}, {"attention_layers": [1], "attention_window": 8}, "student.attention_window is 8"),
        ("llama", {}, {"attention_layers": [1], "attention_log_base": 9.0}, "student.attention_log_base is 9"),
        ("llama", {}, {"attention_layers": [0, 1, 2]}, "names every layer"),
        ("llama", {}, {"preset": "x070", "linear_attention": True}, "student.linear_attention is true"),
        ("gemma2", {}, {"attention_layers": [0]}, "slides over 6 tokens, which mlx-lm's gemma2 does not"),
        ("gemma3_text", {}, {"attention_layers": [0]}, None),  # it slides there, and mlx-lm with it
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
            {},
            "do not recur",
        ),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 3}, {}, "do not recur"),
        ("gemma3_text", {"final_logit_softcapping": 9.0}, {}, "has soft caps"),
        ("gemma2", {"attn_logit_softcapping": None}, {"attention_layers": [1]}, "lacks a soft cap"),
        ("llama", {"hidden_act": "gelu"}, {}, "MLPs have gelu; silu works"),
        ("qwen3", {"attention_bias": True}, {"attention_layers": [1]}, "have biases .attention_bias., which mlx-lm's"),
        ("qwen3", {"attention_bias": True}, {}, None),
        ("granite", {}, {"attention_layers": [1]}, "heads of 64 together"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, {"preset": "x070"}, None),
        ("mistral", {}, {"attention_layers": [1], "attention_window": 8}, None),  # it sees 6 tokens
    ],
)
def test_what_is_refused(family, fields, student, reason):
    found = reasons_against(teacher(family, **fields).config, StudentConfig(**{"attention_layers": []} | student))[
        "mlx"
    ]
    assert (len(found) == 1 and re.search(reason, found[0])) if reason else found == []


def test_options_that_are_refused(run, exported, tmp_path, monkeypatch):
    for options, what in (({"dtype": "q8_0"}, "dtype is 'q8_0'"), ({"adapters": "separate"}, "adapters is 'separate'")):
        with pytest.raises(UserError, match=what):
            export(run, tmp_path / "s", "mlx", **options)
    with pytest.raises(UserError, match="exists and is not empty"):
        export(run, exported[0], "mlx")
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(UserError, match="needs mlx_lm") as error:
        export(run, tmp_path / "s", "mlx")
    assert "pip install" in error.value.hint
    assert not list(tmp_path.iterdir())


def test_damage_and_strange_directories_are_noticed(run, exported, tmp_path):
    damaged = tmp_path / "damaged"
    for name in ("model.safetensors", "hybrid_mlx.py"):
        shutil.copytree(exported[0], damaged)
        content = bytearray((damaged / name).read_bytes())
        content[-9] ^= 0x11
        (damaged / name).write_bytes(content)
        with pytest.raises(VerificationError, match=f"SHA-256 of {name}"):
            verify(damaged, run)
        shutil.rmtree(damaged)
    save_run(tmp_path / "other", run.parent / "teacher", ("mixer", "norms"), {"attention_layers": [1]} | WINDOW)
    with pytest.raises(VerificationError, match="of logits is"):
        verify(exported[0], tmp_path / "other")


@pytest.mark.parametrize(
    "name, old, new",
    [("hybrid_mlx.py", "import", "raise SystemExit\nimport"), ("config.json", "hybrid_mlx.py", "evil.py")],
)
def test_code_of_others_is_not_run(run, exported, tmp_path, name, old, new):
    """A directory whose record was made anew, with other code or a configuration that names it."""
    folder = tmp_path / "s"
    shutil.copytree(exported[0], folder)
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))
    _sealed_anew(folder)
    with pytest.raises(VerificationError, match=f"{name} is not what this version writes"):
        verify(folder, run)
    (folder / "hybrid_mlx.py").unlink()
    _sealed_anew(folder)
    with pytest.raises(VerificationError, match="hybrid_mlx.py is not what this version writes"):
        verify(folder, run)


def _sealed_anew(folder):
    record = unsealed((folder / "conversion.json").read_text())
    (folder / "conversion.json").write_text(sealed_text(record | {"files": digests(folder)}, indent=2))


def test_validation_documents_are_compared(tmp_path):
    run = finished(tmp_path, student=WINDOW)
    save_texts(tmp_path / "val.jsonl", 5)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"data": {"val": [str(tmp_path / "val.jsonl")]}}))
    result = export(run, tmp_path / "s", "mlx")["verification"]
    assert result["validation_rows"] == 2 and 2 * 41 + 41 < result["tokens"] <= 2 * 41 + 41 + 2 * 64


@pytest.mark.parametrize("family, tied, said", [("glm4", True, "one matrix"), ("gemma2", False, "two matrices")])
def test_heads_that_mlx_lm_has_otherwise(tmp_path, family, tied, said):
    with pytest.raises(UserError, match=f"embedding and head are {said}"):
        export(finished(tmp_path, family), tmp_path / "s", "mlx", tie_embeddings=tied)
