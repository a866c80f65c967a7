"""Exports for RWKV-Infer: its own mathematics gives the trained model's logits, and the rest is refused."""

import json

import pytest
import torch
from rwkv_infer_reference import RWKVInfer
from safetensors.torch import load_file

from rwkvinside.cli.main import main as cli
from rwkvinside.errors import UserError, VerificationError
from rwkvinside.export import output, probe, rwkv_infer
from rwkvinside.export.probe import fixed_batch, student_logits
from rwkvinside.export.rwkv_infer import export_rwkv_infer
from rwkvinside.export.rwkv_infer_limits import misfits
from rwkvinside.families.registry import find
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.importers.names import Names
from rwkvinside.runs.trained import open_run
from rwkvinside.support.sealed import unsealed

SIZES = {"hidden_size": 256, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 16}
SMALL = SIZES | {"max_position_embeddings": 64, "initializer_range": 0.1}
RANKS = {"decay": 8, "iclr": 4, "value": 5, "key": 6, "gate": 7}
STUDENT = {"preset": "hxa079", "key_scale": "log", "attention_rope": False, "init": "published", "ranks": RANKS}
LAYOUTS = {"RRR": (), "RAR": (1,), "ARR": (0,), "RRA": (2,)}
THETA = {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}, "rms_norm_eps": 1e-5}


@pytest.fixture
def run_of(tmp_path, make_teacher, make_run):
    """Make a run of a small teacher that RWKV-Infer's sizes fit."""

    def make(family="qwen3", kept=(1,), student=None, **fields):
        teacher = make_teacher(tmp_path / "teacher", family, **SMALL | fields)
        (teacher / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        (teacher / "LICENSE").write_text("the licence")
        changes = STUDENT | {"attention_layers": list(kept)} | (student or {})
        return make_run(
            tmp_path / "run",
            teacher,
            train=("mixer", "mlp", "norms", *(["attention"] if kept else [])),
            student=changes,
        )

    return make


def reference(z, config):
    return RWKVInfer(z, config["rope_theta"], config["rms_norm_eps"])


def trained_logits(run):
    batch = fixed_batch(67)
    return student_logits(open_run(run).load_model(), batch), batch.input_ids


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family, fields", [("llama", {}), ("qwen2", {}), ("qwen3", {"tie_word_embeddings": False})])
def test_its_mathematics_gives_the_trained_logits(run_of, tmp_path, family, fields, layout):
    run = run_of(family, LAYOUTS[layout], **THETA | fields)
    report = export_rwkv_infer(run, tmp_path / "out.pth")
    assert report["verification"]["max_difference"] <= 1e-6 and report["dtype"] == "float32"
    z = torch.load(tmp_path / "out.pth", weights_only=True, mmap=True)
    expected, ids = trained_logits(run)
    program = reference(z, json.loads((tmp_path / "out" / "config.json").read_text()))
    for row, logits in zip(ids, expected, strict=True):
        assert (program.logits(row) - logits).abs().max() < 1e-4 * logits.abs().max().clamp(min=1)


def test_directory_has_the_same_tensors_and_all_that_is_read(run_of, tmp_path):
    run = run_of()
    report = export_rwkv_infer(run, tmp_path / "out", dtype="bfloat16")
    export_rwkv_infer(run, tmp_path / "flat.pth", dtype="bfloat16")
    tensors, flat = load_file(tmp_path / "out" / "model.safetensors"), torch.load(tmp_path / "flat.pth")
    named = {Names(find("qwen3")).rwkv_infer(name): tensor for name, tensor in tensors.items()}
    assert named.keys() == flat.keys() and all(torch.equal(tensor, flat[name]) for name, tensor in named.items())
    first = "model.layers.0.self_attn."
    assert {f"{first}{name}" for name in ("v0", "v1", "v2", "k0", "k1", "k2")} <= set(tensors), "the first layer's, too"
    assert tensors[f"{first}w0"].dtype == torch.float32 and tensors[f"{first}w1"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rwkv_architecture"] == "hxa079" and config["tie_word_embeddings"] is False
    read = ("num_hidden_layers", "num_key_value_heads", "head_dim", "num_attention_heads", "rms_norm_eps", "rope_theta")
    assert [config[name] for name in read] == [3, 2, 16, 4, 1e-6, 10000.0]
    for folder in ("out", "flat"):
        assert (tmp_path / folder / "LICENSE").read_text() == "the licence"
        assert (tmp_path / folder / "tokenizer_config.json").is_file()
    assert not (tmp_path / "flat" / "model.safetensors").exists() and not list(tmp_path.glob(".*"))
    assert unsealed((tmp_path / "out" / "conversion.json").read_text()) == report
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"rope_theta": "10000"' in card and '"template": "out"' in card and "base_model: teacher" in card
    assert "library_name" not in card and "from_pretrained" not in card and "`RAR`" in card


def test_rounded_weights_are_compared_as_they_are_stored(run_of, tmp_path):
    run = run_of(dtype=torch.bfloat16)
    report = export_rwkv_infer(run, tmp_path / "out.pth")
    assert report["dtype"] == "bfloat16" and report["verification"]["max_difference"] <= 1e-6


def test_damage_on_the_way_leaves_nothing(run_of, tmp_path, monkeypatch):
    run, write = run_of(), rwkv_infer._write_weights

    def damaged(tensors, file, names):
        name = "model.layers.0.mlp.up_proj.weight"
        write(tensors | {name: tensors[name] + 1e-3}, file, names)

    monkeypatch.setattr(rwkv_infer, "_write_weights", damaged)
    for out in ("out.pth", "out"):
        with pytest.raises(VerificationError, match=r"1 tensors are not those of the run, first model\.layers\.0\.mlp"):
            export_rwkv_infer(run, tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "teacher"]


def test_merging_that_changes_the_model_is_noticed(run_of, tmp_path, monkeypatch):
    def merged(model):
        model.canonical_parameters()["model.norm.weight"].data.mul_(1.1)

    monkeypatch.setattr(probe, "adapter_names", lambda model: ["one"])
    monkeypatch.setattr(probe, "make_plain", merged)
    with pytest.raises(VerificationError, match="unpacking and merging changes logits by"):
        export_rwkv_infer(run_of(), tmp_path / "out.pth")


def test_what_exists_is_left_alone(run_of, tmp_path):
    run = run_of()
    (tmp_path / "out.pth").write_text("mine")
    with pytest.raises(UserError, match=r"out\.pth exists"):
        export_rwkv_infer(run, tmp_path / "out.pth")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for out in ("other.pth", "other"):
        with pytest.raises(UserError, match="other exists and is not empty"):
            export_rwkv_infer(run, tmp_path / out)
    assert (tmp_path / "out.pth").read_text() == "mine"


def test_options_that_it_does_not_have(run_of, tmp_path, capsys):
    run, out = str(run_of()), str(tmp_path / "out.pth")
    with pytest.raises(UserError, match="dtype is 'q8_0'"):
        export_rwkv_infer(run, out, dtype="q8_0")
    for option, said in (
        ("--tie-embeddings", "have no option tie_embeddings"),
        ("--adapters=separate", "have them merged"),
    ):
        assert cli(["export", run, "--to", "rwkv-infer", "--out", out, option]) == 2
        assert said in capsys.readouterr().err


def test_verify(run_of, make_run, tmp_path, capsys):
    run = run_of(dtype=torch.bfloat16)
    for out in ("flat.pth", "whole"):
        export_rwkv_infer(run, tmp_path / out)
    for path in ("flat.pth", "flat", "whole"):
        assert cli(["verify", str(tmp_path / path), "--against", str(run)]) == 0
        assert "passed: True" in capsys.readouterr().out
    other = make_run(tmp_path / "other", tmp_path / "teacher", student=STUDENT | {"attention_layers": [1]})
    assert cli(["verify", str(tmp_path / "whole"), "--against", str(other)]) == 3
    assert "tensors are not those of the run" in capsys.readouterr().err
    (tmp_path / "whole" / "LICENSE").write_text("another one")
    assert cli(["verify", str(tmp_path / "whole"), "--against", str(run)]) == 3
    assert "the SHA-256 of LICENSE is not the one written" in capsys.readouterr().err


def test_a_full_disk_is_told(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match="the export needs"):
        export_rwkv_infer(run_of(), tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


HYBRID = {"attention_layers": (1,)}
REFUSED = {
    "student.key_scale is decay; log works": ({"key_scale": "decay"}, {}),
    "student.key_residual is false; true works": ({"key_residual": False}, {}),
    "student.window is 8; 0 works": ({"window": {"2": 8}}, {}),
    "student.output_scale is 0.5; 1 works": ({"output_scale": 0.5}, {}),
    "student.preset is cxa078; cxa079 and hxa079 work": ({"preset": "cxa078"}, {}),
    "student.preset is x070; cxa079 and hxa079 work": ({"preset": "x070"}, {}),
    "student.attention_rope is true; false works": (HYBRID | {"attention_rope": True}, {}),
    "student.attention_log_base is 500; null works": (HYBRID | {"attention_log_base": 500}, {}),
    "student.attention_window is 9; 0 works": (HYBRID | {"attention_window": 9}, {}),
    "student.attention_layers names every layer; at least one RWKV layer works": ({"attention_layers": (0, 1, 2)}, {}),
    "the teacher's family is gemma2; llama, qwen2, qwen3, mistral, ministral, smollm3 work, with RMSNorm": (
        {},
        {"model_type": "gemma2"},
    ),
    "the teacher's rotation is of type linear; default works": (
        {},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "the teacher's hidden_act is gelu; silu works": ({}, {"hidden_act": "gelu"}),
    "the teacher's MLPs have biases (mlp_bias); none work": ({}, {"model_type": "llama", "mlp_bias": True}),
    "the teacher's attention has a bias on its output": ({}, {"attention_bias": True}),
    "the teacher's hidden_size is 576; multiples of 256 work": ({}, {"hidden_size": 576}),
    "layer 1 keeps attention that slides over 6 tokens; full attention works": (
        HYBRID,
        {"model_type": "mistral", "sliding_window": 6},
    ),
    "layer 1 of the teacher does not rotate; keep its attention": (
        {},
        {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    ),
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_it_does_not_compute_is_named_from_configurations(line):
    from transformers import AutoConfig

    student, teacher = REFUSED[line]
    fields = {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2} | SIZES | teacher
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    spec = StudentConfig.model_validate(
        STUDENT | student | ({"preset": "x070"} if "linear_attention" in student else {})
    )
    lines = misfits(config, spec)
    assert len(lines) == 1 and lines[0].startswith(line), lines


def test_layers_that_are_still_to_be_chosen_count_as_kept():
    from transformers import Qwen3Config

    spec = StudentConfig.model_validate(
        {"key_scale": "log", "attention_layers": {"choose": "restore", "keep": 1}}, context={"num_layers": 3}
    )
    config = Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2)
    assert misfits(config, spec) == ["student.attention_rope is true; false works"]


def test_refusals_of_the_command(run, tmp_path, capsys):
    assert cli(["export", str(run), "--to", "rwkv-infer", "--out", str(tmp_path / "out.pth")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"error: RWKV-Infer does not compute what {run} has trained:",
        "  the teacher's hidden_size is 32; multiples of 256 work",
        "  student.attention_rope is true; false works",
        "  student.key_scale is decay; log works",
        "--to hf exports every student; docs/engines.md tells how one for RWKV-Infer is trained",
    ]
    assert not list(tmp_path.iterdir())


def test_command(run_of, tmp_path, capsys):
    out = tmp_path / "student.pth"
    assert cli(["export", str(run_of()), "--to", "rwkv-infer", "--dtype", "fp16", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {out}: stage distill, step-00000002, ")
    assert torch.load(out)["emb.weight"].dtype == torch.float16
