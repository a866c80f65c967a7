"""Export of runs that had quantized weights and adapters: unpacked, merged or as PEFT's own, and verified."""

import json
import warnings

import pytest
import torch
import yaml
from peft import PeftModel
from plans import layer_spec
from transformers import AutoModelForCausalLM

import convert_checkpoint
from rwkvinside.errors import UserError
from rwkvinside.export.huggingface import export_hf
from rwkvinside.export.record import _without_paths
from rwkvinside.hybrid.adapters import is_adapter
from rwkvinside.hybrid.assemble import assemble, frozen_weights_of, make_plain
from rwkvinside.hybrid.settings import AdapterConfig, StudentConfig
from rwkvinside.runs.trained import open_run
from rwkvinside.training.checkpoint import Checkpointer, open_checkpoint
from rwkvinside.training.frozen_weights import NAME, write_frozen_weights

ADAPTERS = [
    {"kind": "lora", "groups": ["mlp"], "rank": 4, "rank_stabilized": True},
    {"kind": "miss", "groups": ["attention"], "rank": 4},
    {"kind": "bone", "groups": ["head"], "rank": 1},
]


@pytest.fixture(scope="module")
def economical(tmp_path_factory, teacher, make_run):
    """A finished run with nf4 under MLPs and teacher attention, and three kinds of adapters that are not zero."""
    path = make_run(tmp_path_factory.mktemp("economical"), teacher, train=("mixer", "norms"))
    config = yaml.safe_load((path / "config.yaml").read_text())
    config |= {"quantize": {"groups": ["mlp", "teacher"], "format": "nf4", "double": True}, "adapters": ADAPTERS}
    before = open_checkpoint(open_run(path).checkpoint).tensors()
    lm = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    structure = layer_spec(("mlp", "teacher"), adapters=tuple(map(AdapterConfig.model_validate, ADAPTERS)))
    student = assemble(lm, StudentConfig.model_validate(config["student"]), structure, before)
    torch.manual_seed(2)
    for name, parameter in student.canonical_parameters().items():
        if is_adapter(name):
            parameter.data += 0.05 * torch.randn_like(parameter)
    folder = path / "stages" / "distill"
    digest = write_frozen_weights(folder, frozen_weights_of(student))
    state = {"stage": "distill", "settings": {"frozen": digest}}
    Checkpointer(folder, {}).save(3, student.student_state_dict(), None, state)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def trained_logits(run):
    from rwkvinside.export.probe import fixed_batch, student_logits

    return student_logits(open_run(run).load_model(), fixed_batch(67)), fixed_batch(67).input_ids


def test_merged_export_computes_what_training_computed(economical, tmp_path, capsys):
    out = tmp_path / "merged"
    assert convert_checkpoint.main(["export", str(economical), "--out", str(out), "--merge"]) == 0
    said = capsys.readouterr().out
    assert "12 linear layers" in said and "nf4" in said and "merged into the weights" in said
    conversion = json.loads((out / "conversion.json").read_text())
    assert conversion["quantized"]["layers"] == [
        f"model.layers.{i}.mlp.{name}_proj" for i in range(4) for name in ("gate", "up", "down")
    ]
    assert 0.05 < conversion["quantized"]["relative_error"] < 0.15
    assert conversion["adapters"]["merged"] and len(conversion["adapters"]["trained"]) == 3
    assert conversion["verification"]["max_difference"] <= 1e-5
    assert conversion["verification"]["plain_difference"] <= 1e-5
    assert not list(out.glob("adapter*"))
    assert "frozen in nf4" in (out / "README.md").read_text()
    wanted, ids = trained_logits(economical)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, wanted, atol=1e-5)


def test_separate_adapters_are_peft_adapters_of_the_exported_model(economical, tmp_path):
    out = tmp_path / "separate"
    report = export_hf(economical, out, adapters="separate")
    assert report["adapters"]["directories"] == ["adapter", "adapter-2", "adapter-3"]
    assert report["verification"]["adapter_difference"] <= 1e-5
    assert "adapter, adapter-2, adapter-3, each to be merged" in (out / "README.md").read_text()
    assert {"adapter/adapter_config.json", "adapter-3/adapter_model.safetensors"} <= set(report["files"])
    wanted, ids = trained_logits(economical)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, wanted, atol=1e-2)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT's, of adapters that miss tensors or get in the way
            for name in report["adapters"]["directories"]:
                model = PeftModel.from_pretrained(model, out / name).merge_and_unload()
        assert torch.allclose(model(ids).logits, wanted, atol=1e-5)
    assert not json.loads((out / "config.json").read_text())["tie_word_embeddings"]  # or PEFT would change both


def test_weights_are_dequantized_before_they_are_merged(economical):
    trained = open_run(economical).load_model()
    layers = {name: layer.weight for name, layer in trained.quantized.items() if "mlp" in name}
    specials = {name: p.detach().clone() for name, p in trained.canonical_parameters().items() if is_adapter(name)}
    make_plain(trained)
    for name, unpacked in layers.items():
        a, b = (specials[f"{name}.lora_{x}.default.weight"] for x in "AB")
        merged = trained.canonical_parameters()[f"{name}.weight"]
        assert torch.allclose(merged, unpacked + 8 / 4**0.5 * b @ a, atol=1e-6)  # rank-stabilized: alpha / sqrt(r)
    assert not any(map(is_adapter, trained.canonical_parameters()))


def test_no_path_of_a_second_teacher_or_its_logits_is_exported(tmp_path):
    stage = {"objective": "distill", "data": {"train": [str(tmp_path)], "seq_len": 8}, "teacher_cache": str(tmp_path)}
    for path, name in ((tmp_path, tmp_path.name), ("/gone/Qwen3-8B", "Qwen3-8B"), ("owner/model", "owner/model")):
        shown = _without_paths(stage | {"teacher_model": {"path": str(path), "quantize": "nf4"}})
        second = {"path": name, "quantize": "nf4"}
        assert shown == {"objective": "distill", "data": {"seq_len": 8}, "teacher_model": second}


def test_refusals(economical, run, tmp_path):
    with pytest.raises(UserError, match="was trained without adapters"):
        export_hf(run, tmp_path / "out", adapters="separate")
    with pytest.raises(UserError, match="adapters is 'both'"):
        export_hf(run, tmp_path / "out", adapters="both")
    frozen = economical / "stages" / "distill" / NAME
    content = frozen.read_bytes()
    try:
        frozen.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match="frozen.safetensors is damaged"):
            open_run(economical).load_model()
    finally:
        frozen.write_bytes(content)
