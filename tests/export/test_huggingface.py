"""The exported directory: complete, self-contained, verified, or not there at all."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from hybrid_cases import batch_of
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rwkvinside.errors import UserError, VerificationError
from rwkvinside.export import huggingface
from rwkvinside.export.huggingface import build_hybrid, export_hf
from rwkvinside.export.verify import verify
from rwkvinside.hybrid.lm_head import Logits
from rwkvinside.runs.trained import open_run
from rwkvinside.support.sealed import unsealed
from rwkvinside.training.checkpoint import Checkpointer


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "student"
    return out, export_hf(run, out, max_shard_size="20KB")


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **kwargs).eval()


def test_directory_is_complete(exported):
    out, report = exported
    names = {file.name for file in out.iterdir()}
    code = {
        f"{m}.py"
        for m in (
            "hybrid_qwen3",
            "hybrid_base",
            "rwkv_attention",
            "recurrent_cache",
            "first_layer",
            "time_mixer",
            "mixer_init",
            "mixer_presets",
            "wkv7",
            "wkv7_chunked",
        )
    }
    assert code | {"config.json", "generation_config.json", "conversion.json", "README.md"} <= names
    assert "model.safetensors.index.json" in names and sum(n.endswith(".safetensors") for n in names) > 2
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "hybrid_qwen3.HybridQwen3Config",
        "AutoModelForCausalLM": "hybrid_qwen3.HybridQwen3ForCausalLM",
    }
    assert config["rwkv_layers"] == [0, 2, 3] and config["rwkv_architecture"] == "cxa079"
    assert config["mixer"]["num_heads"] == 4 and config["mixer_layers"] == {}
    assert unsealed((out / "conversion.json").read_text()) == report
    assert set(report["files"]) == {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()} - {
        "conversion.json"
    }
    assert (out / "LICENSE").read_text() == "the licence" and (
        out / "chat_template.jinja"
    ).read_text() == "{{ messages }}"
    assert not list(out.parent.glob(".*")), "the temporary directory is gone"


def test_no_local_path_or_data_file_is_named(exported, teacher, run):
    out, _ = exported
    for file in out.glob("*.*"):
        if file.suffix in (".json", ".md"):
            text = file.read_text()
            assert "/secret/place" not in text and str(teacher.parent) not in text and str(run) not in text, file.name


def test_verification_result(exported):
    _, report = exported
    result = report["verification"]
    assert result["passed"] and result["dtype"] == "float32"
    # the same fp32 operations in the same order
    assert result["max_difference"] <= 1e-6
    assert 0 < result["cache_difference"] < 1e-4
    assert abs(result["rounding_kl"]) < 1e-6


def test_every_tensor_comes_from_the_run(exported, run):
    out, _ = exported
    loaded = dict(load(out).named_parameters())
    trained = open_run(run).load_model().canonical_parameters()
    overlay = load_file(open_run(run).checkpoint / "model.safetensors")
    assert set(loaded) == set(trained) - {"lm_head.weight"}, "tied: the head is the embedding"
    for name, tensor in loaded.items():
        assert torch.equal(tensor, trained[name]), name
        if name in overlay:
            assert torch.equal(tensor, overlay[name]), name
    assert "model.layers.1.self_attn.q_proj.weight" in loaded and "model.layers.0.self_attn.q_proj.weight" not in loaded


def test_generation_config_is_the_teachers(exported, teacher):
    ours, theirs = GenerationConfig.from_pretrained(exported[0]), GenerationConfig.from_pretrained(teacher)
    assert ours.eos_token_id == theirs.eos_token_id == [2, 3]


def test_card(exported):
    card = ModelCard.load(exported[0] / "README.md")
    assert card.data.base_model == "tiny-qwen3" and card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-generation" and {"rwkv7", "custom_code"} <= set(card.data.tags)
    assert "| distill | 200 | 0.2500 | 1.5000 | 0.8750 |" in card.text and "`RARR`" in card.text
    assert "control" not in card.text, "only a windowed student has one"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_other_families(tmp_path, family, make_teacher, make_run):
    bias = {"attention_bias": True} if family == "llama" else {}
    teacher = make_teacher(tmp_path / "teacher", family, tie_word_embeddings=False, **bias)
    run = make_run(
        tmp_path / "run", teacher, student={"preset": "hxa079", "attention_rope": False, "attention_layers": [0, 2]}
    )
    report = export_hf(run, tmp_path / "out")
    assert report["verification"]["max_difference"] <= 1e-6
    model, prompt = load(tmp_path / "out"), torch.tensor([[5, 6, 7]])
    assert model.generate(prompt, max_new_tokens=4, min_new_tokens=4).shape == (1, 7)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate_graphed(prompt, **greedy), model.generate(prompt, **greedy))


def test_windows(tmp_path, teacher, make_run):
    run = make_run(tmp_path / "run", teacher, student={"window": 6, "sinks": 2, "window_mix": "softmax"})
    control = {"kl": 0.75, "ce": 1.75, "ce_teacher": 1.25, "agreement": 0.5}
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"kind": "control", "stage": "calibrate", "step": 1, "tokens": 100} | control) + "\n")
    report = export_hf(run, tmp_path / "out")
    result = report["verification"]
    assert report["control"] == control
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| (control) |  | 0.7500 | 1.7500 | 0.5000 |" in card and "cut to the windows" in " ".join(card.split())
    assert result["max_difference"] <= 1e-6 and 0 < result["cache_difference"] < 1e-4
    assert (tmp_path / "out" / "window_attention.py").is_file()
    model, prompt = load(tmp_path / "out"), torch.arange(5, 25)[None]
    assert {(model.config.mixer_config(i).window, model.config.mixer_config(i).sinks) for i in (0, 2, 3)} == {(6, 2)}
    logits = open_run(run).load_model()(batch_of(prompt), task=Logits())
    torch.testing.assert_close(model(prompt).logits, logits, rtol=0, atol=1e-5)
    greedy = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    tokens = model.generate(prompt, **greedy)
    assert torch.equal(tokens, model.generate(prompt, use_cache=False, **greedy))
    assert verify(tmp_path / "out", against=run)["passed"]


def test_windows_by_layer(tmp_path, teacher, make_run):
    run = make_run(tmp_path / "run", teacher, student={"window": {"0": 6, "3": 3}, "sinks": 2, "window_mix": "softmax"})
    export_hf(run, tmp_path / "out")
    model, prompt = load(tmp_path / "out"), torch.arange(5, 25)[None]
    mixers = {i: model.config.mixer_config(i) for i in (0, 2, 3)}
    assert {i: (c.window, c.sinks) for i, c in mixers.items()} == {0: (6, 2), 2: (0, 0), 3: (3, 2)}
    assert model.config.mixer_layers == {"2": {"window": 0, "sinks": 0}, "3": {"window": 3}}
    logits = open_run(run).load_model()(batch_of(prompt), task=Logits())
    torch.testing.assert_close(model(prompt).logits, logits, rtol=0, atol=1e-5)


def test_bf16_teacher_gives_a_bf16_export_with_fp32_decay(tmp_path, make_teacher, make_run, monkeypatch):
    teacher = make_teacher(tmp_path / "teacher", dtype=torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    report = export_hf(make_run(tmp_path / "run", teacher), "out")  # here, wherever that is
    assert report["dtype"] == report["verification"]["dtype"] == "bfloat16"
    assert report["verification"]["max_difference"] <= 1e-6, "against the trained weights rounded to bf16"
    assert 0 < report["verification"]["rounding_kl"] < 0.05
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    fp32 = {name.rsplit(".", 1)[-1] for name, t in tensors.items() if t.dtype == torch.float32}
    assert fp32 == {"w0", "a0", "v0", "k0"}
    loaded = load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and loaded.model.layers[0].self_attn.w0.dtype == torch.float32


@pytest.mark.parametrize(
    "train, tied", [(("mixer",), True), (("mixer", "head"), False), (("mixer", "embed", "head"), False)]
)
def test_embeddings_are_tied_again_only_when_equal(tmp_path, teacher, make_run, train, tied):
    run = open_run(make_run(tmp_path / "run", teacher, train=train))
    trained = run.load_model()
    model = build_hybrid(trained, run, torch.float32, tie_embeddings=None)
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert torch.equal(model.lm_head.weight, trained.lm.lm_head.weight)
    apart = build_hybrid(trained, run, torch.float32, tie_embeddings=False)
    assert not apart.config.tie_word_embeddings and apart.lm_head.weight is not apart.model.embed_tokens.weight
    apart.save_pretrained(tmp_path / "apart")
    assert "lm_head.weight" in load_file(tmp_path / "apart" / "model.safetensors")
    if not tied:
        with pytest.raises(UserError, match="cannot be tied: input and output differ by up to"):
            export_hf(run.path, tmp_path / "tied", tie_embeddings=True)
        assert not (tmp_path / "tied").exists()


def test_tensors_without_source_or_target_are_refused(tmp_path, run):
    opened = open_run(run)
    trained = opened.load_model()
    trained.lm.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(UserError, match=r"model.extra: target missing, source \(2,\)"):
        build_hybrid(trained, opened, torch.float32, None)
    del trained.lm.model.extra, trained.lm.model.layers[2].self_attn.student_attn.w0
    with pytest.raises(UserError, match=r"layers.2.self_attn.w0: target \(1, 1, 32\), source missing"):
        build_hybrid(trained, opened, torch.float32, None)


def test_reloaded_export_can_be_saved_again(exported, tmp_path):
    model = load(exported[0])
    model.save_pretrained(tmp_path / "again")
    ids = torch.arange(20)[None]
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


def test_refusals_leave_nothing(tmp_path, run, exported):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        export_hf(run, tmp_path / "full")
    assert [f.name for f in tmp_path.iterdir()] == ["full"] and (tmp_path / "full" / "thesis.txt").exists()
    with pytest.raises(UserError, match="dtype is 'int7'"):
        export_hf(run, tmp_path / "out", dtype="int7")
    with pytest.raises(UserError, match="config.yaml is missing"):
        export_hf(tmp_path / "full", tmp_path / "out")
    with pytest.raises(UserError, match="is not an exported model"):
        verify(run, against=run)
    assert not (tmp_path / "out").exists()


def test_unfinished_run(tmp_path, run):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "conversion.json").write_text('{"finished_stages": []}')
    with pytest.raises(UserError, match="no finished stage"):
        export_hf(tmp_path / "run", tmp_path / "out")


def test_a_teacher_that_is_gone(tmp_path, run, teacher):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(teacher), str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="nowhere cannot be loaded"):
        export_hf(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize(
    "damage, said",
    [
        ("truncated", "is corrupt: model.safetensors has"),
        ("changed", "is corrupt: the SHA-256 of model.safetensors"),
        ("missing tensor", "w0 is missing"),
        ("unknown tensor", "w0 is unknown"),
        ("shape", "has shape"),
    ],
)
def test_damaged_checkpoint(tmp_path, run, damage, said):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = open_run(tmp_path / "run").checkpoint
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "changed":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        if damage == "missing tensor":
            del tensors["model.layers.2.self_attn.w0"]
        elif damage == "unknown tensor":
            tensors["model.layers.1.self_attn.w0"] = tensors["model.layers.2.self_attn.w0"].clone()
        else:
            tensors["model.layers.2.self_attn.w2"] = torch.zeros(3, 32)
        Checkpointer(checkpoint.parent, {}).save(2, tensors, None, {})
    with pytest.raises(UserError, match=said):
        export_hf(tmp_path / "run", tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run"]


def test_a_wrong_weight_fails_verification_and_leaves_nothing(tmp_path, run, monkeypatch):
    save = huggingface._save_weights

    def save_wrongly(model, *args):
        with torch.no_grad():
            model.model.layers[3].self_attn.value.weight[0, 0] += 0.1
        save(model, *args)

    monkeypatch.setattr(huggingface, "_save_weights", save_wrongly)
    said = r"1 tensors are not those of the run, first model.layers.3.self_attn.value.weight \(1 of"
    with pytest.raises(VerificationError, match=said) as error:
        export_hf(run, tmp_path / "out")
    assert error.value.exit_code == 3
    assert not list(tmp_path.iterdir())


def test_verify_again_writes_nothing(exported, run):
    before = {file: file.stat().st_mtime_ns for file in exported[0].rglob("*")}
    assert verify(exported[0], against=run) == exported[1]["verification"]
    assert {file: file.stat().st_mtime_ns for file in exported[0].rglob("*")} == before


def test_stories260k(shared, tmp_path, make_run):
    teacher = shared / "teachers" / "stories260k"
    run = make_run(tmp_path / "run", teacher, train=("mixer",), student={"attention_layers": []})
    (tmp_path / "out").mkdir()
    report = export_hf(run, tmp_path / "out")  # an empty directory may be there already
    assert report["verification"]["max_difference"] <= 1e-5 and report["tie_word_embeddings"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    text = "Once upon a time, there was a little girl"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(teacher)(text)["input_ids"]
    assert AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True).model_type == "hybrid_llama"
