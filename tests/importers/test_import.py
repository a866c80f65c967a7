"""Checkpoints of other programs become runs with exactly their tensors, or are refused in a line."""

import json
import pickle

import pytest
import torch
from finished_run import save_run
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_qwen3, save_texts

from rwkvinside.cli.main import main as cli
from rwkvinside.errors import UserError
from rwkvinside.export.huggingface import export_hf
from rwkvinside.families.registry import find
from rwkvinside.importers.names import Names
from rwkvinside.importers.run import import_checkpoint
from rwkvinside.runs.directory import RunDirectory
from rwkvinside.runs.trained import open_run

NAMES = Names(find("qwen3"))
RANKS = {"decay": 8, "iclr": 4, "value": 5, "key": 6, "gate": 7}
HYBRID = {"preset": "hxa079", "attention_layers": [1], "attention_rope": False}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teachers") / "tiny"
    save_qwen3(
        path, byte_tokenizer("<|endoftext|>", eos_token="<|endoftext|>"), num_attention_heads=4, num_key_value_heads=2
    )
    return path


@pytest.fixture
def students(tmp_path, teacher):
    """Make the tensors of a student, by canonical name, in bf16 but for the biases of its low-rank maps."""

    def make(train=("mixer", "mlp", "norms", "embed", "head"), **student):
        fields = {"key_scale": None, "init": "published", "attention_layers": [], "ranks": RANKS} | student
        run = save_run(tmp_path / "made", teacher, train=train, student=fields)
        model = open_run(run).load_model()
        wide = ("w0", "a0", "v0", "k0")
        return {
            name: p.detach().clone() if name.endswith(wide) else p.detach().bfloat16()
            for name, p in model.canonical_parameters().items()
        }

    return make


def as_infer(tensors, path):
    torch.save({NAMES.rwkv_infer(name): tensor for name, tensor in tensors.items()}, path)
    return path


def as_training(tensors, path):
    """The earlier project's names, with what its modules have besides."""
    mixers = {name for name in tensors if NAMES.mixer_part(name) and ".q_" not in name}
    named = {
        f"model.{name.replace('.self_attn.', '.self_attn.student_attn.') if name in mixers else name}": tensor
        for name, tensor in tensors.items()
    }
    named |= {"layer_architecture": torch.tensor(78), "model.model.layers.1.head_size_record": torch.tensor(64)}
    torch.save(named | {"model.model.layers.0.self_attn.teacher_attn.q_proj.weight": torch.zeros(2)}, path)
    return path


def as_shards(tensors, path):
    path.mkdir()
    config = {"rwkv_architecture": "hxa079", "num_hidden_layers": 3, "hidden_size": 16, "head_dim": 8}
    (path / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name].contiguous() for name in part}, path / f"model-{i}.safetensors")
    return path


FORMS = {"infer": as_infer, "training": as_training, "shards": as_shards}


def same(run, tensors):
    parameters = open_run(run).load_model().canonical_parameters()
    assert parameters.keys() == tensors.keys()
    return all(torch.equal(parameters[name], tensor.float()) for name, tensor in tensors.items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("student", [{"preset": "cxa079"}, HYBRID], ids=["cxa079", "hxa079"])
def test_every_form_round_trips_bit_by_bit(students, teacher, tmp_path, form, student):
    tensors = students(**student)
    file = FORMS[form](tensors, tmp_path / "checkpoint.pth" if form != "shards" else tmp_path / "shards")
    rope = False if form == "training" and student is HYBRID else None
    found = import_checkpoint(file, str(teacher), tmp_path / "run", attention_rope=rope)
    assert (found.preset, found.tensors) == (student["preset"], len(tensors))
    assert found.layout == ("RAR" if student is HYBRID else "RRR")
    assert same(tmp_path / "run", tensors)
    spec = open_run(tmp_path / "run").spec
    assert spec.key_scale == "log" and spec.ranks.model_dump() == RANKS
    assert spec.attention_rope is (student is not HYBRID)
    export_hf(tmp_path / "run", tmp_path / "hf", dtype="bfloat16")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("preset", ["hxa07a", "hxa07b", "hxa07c", "cxa078", "cxa076r", "rad"])
def test_other_variants(students, teacher, tmp_path, preset):
    tensors = students(preset=preset)
    file = as_infer(tensors, tmp_path / "checkpoint.pth")
    if preset in ("hxa07a", "rad"):
        found = import_checkpoint(file, str(teacher), tmp_path / "run")
    else:
        pair = {"hxa07b or hxa07c", "cxa078 or cxa076r"}
        with pytest.raises(UserError, match="|".join(pair)) as refused:
            import_checkpoint(file, str(teacher), tmp_path / "run")
        assert f"--preset {preset}" in refused.value.hint and not (tmp_path / "run").exists()
        found = import_checkpoint(file, str(teacher), tmp_path / "run", preset=preset)
    assert found.preset == preset and same(tmp_path / "run", tensors)


def test_first_layer_may_have_mixes_that_nothing_reads(students, teacher, tmp_path):
    tensors = students(preset="cxa079")
    second = {NAMES.mixer_part(name)[1]: tensor for name, tensor in tensors.items() if ".layers.1.self_attn." in name}
    unread = {NAMES.in_attention(0, part): second[part] for part in ("v0", "v1", "v2", "k0", "k1", "k2")}
    import_checkpoint(as_infer(tensors | unread, tmp_path / "x.pth"), str(teacher), tmp_path / "run")
    assert same(tmp_path / "run", tensors)


def test_training_files_may_hold_the_trained_part_alone(students, teacher, tmp_path):
    tensors = students(train=("mixer",), preset="cxa079")
    mixers = {name: tensor for name, tensor in tensors.items() if NAMES.mixer_part(name)}
    found = import_checkpoint(as_training(mixers, tmp_path / "x.pth"), str(teacher), tmp_path / "run")
    assert found.changed == ("mixer",) and found.tensors == len(mixers)
    parameters = open_run(tmp_path / "run").load_model().canonical_parameters()
    of_teacher = load_file(teacher / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        assert torch.equal(parameters[name], of_teacher[name])
    with pytest.raises(UserError, match=r"is missing, a cxa079 of it needs"):
        import_checkpoint(as_infer(mixers, tmp_path / "y.pth"), str(teacher), tmp_path / "other")


def test_the_run_is_one_to_everything_else(students, teacher, tmp_path, capsys):
    as_infer(students(preset="cxa079"), tmp_path / "x.pth")
    run, text = tmp_path / "run", tmp_path / "texts.jsonl"
    save_texts(text)
    command = ["import", str(tmp_path / "x.pth"), "--teacher", str(teacher), "--out", str(run)]
    assert cli(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {run}: cxa079, RRR, 75 tensors with names of RWKV-Infer",
        "from the teacher differ: mixer, mlp, norms, embed, head",
    ]
    assert cli(["eval", str(run), "--teacher", str(teacher), "--data", str(text), "--max-documents", "4"]) == 0
    assert cli(["generate", str(run), "--prompt", "the quick", "--max-tokens", "3"]) == 0
    settings = ["stages.distill.tokens=128", "stages.distill.data.seq_len=32", "stages.distill.batch.tokens=64"]
    train = ["train", "-c", str(run / "config.yaml"), "--out", str(run), "--stage", "distill", *settings]
    assert cli([*train, "--data", str(text), "--val", str(text), "--allow-changes"]) == 0
    assert RunDirectory(run).finished() == ["imported", "distill"]
    assert RunDirectory(run).records.stage("distill").before == "imported"
    assert cli(["report", str(run)]) == 0 and (run / "report.html").is_file()
    assert cli(command) == 2 and "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda t: t | {"model.layers.1.self_attn.w0": torch.full((1, 1, 32), torch.nan)}, "not finite"),
        (lambda t: t | {"model.layers.1.self_attn.w0": torch.zeros(1, 1, 31)}, r"w0 is of shape \(1, 1, 31\)"),
        (lambda t: t | {"model.layers.2.self_attn.w1": torch.zeros(16, 9)}, "others have rank 8"),
        (lambda t: t | {"model.layers.3.self_attn.w1": torch.zeros(16, 8)}, "the teacher has layers 0 to 2"),
        (lambda t: t | {"model.layers.1.self_attn.x_r": torch.zeros(1, 1, 16)}, "stock RWKV-7"),
        (lambda t: t | {"model.layers.1.mlp.up_proj.lora_A": torch.zeros(4, 16)}, "adapters that are not merged"),
        (lambda t: t | {"model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2, dtype=torch.int8)}, "is int8"),
        (lambda t: {n: x for n, x in t.items() if "mlp.down" not in n}, r"down_proj\.weight is missing"),
        (lambda t: t | {"model.layers.1.self_attn.q_proj.weight": torch.zeros(32, 16)}, "has no such tensor"),
        (lambda t: {n: x for n, x in t.items() if "self_attn" not in n}, "no tensors of an RWKV student"),
        (lambda t: {n: x for n, x in t.items() if "receptance" not in n and ".w1" not in n}, "has no RWKV layer"),
    ],
)
def test_what_does_not_fit_ends_in_a_line(students, teacher, tmp_path, damage, said):
    save_file(damage(students(preset="cxa079")), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said) as refused:
        import_checkpoint(tmp_path / "x.safetensors", str(teacher), tmp_path / "run")
    assert "\n" not in refused.value.cause and not (tmp_path / "run").exists()


class Code:
    def __reduce__(self):
        return (print, ("code of the file has run",))


def test_files_that_are_no_checkpoints(students, teacher, tmp_path, capsys):
    whole = as_infer(students(preset="cxa079"), tmp_path / "whole.pth").read_bytes()
    files = {
        "cut.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "text.pth": b"no weights at all",
        "code.pth": pickle.dumps(Code()),
        "cut.safetensors": b"\x40\0\0\0\0\0\0\0{",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"emb.weight": Code()}, tmp_path / "object.pth")
    torch.save({"model": {}, "optimizer": {}}, tmp_path / "wrapped.pth")
    (tmp_path / "folder").mkdir()
    for name in (*files, "object.pth", "wrapped.pth", "folder", "missing.pth"):
        command = ["import", str(tmp_path / name), "--teacher", str(teacher), "--out", str(tmp_path / "run")]
        assert cli(command) == 2, name
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and name in said.err and len(said.err.splitlines()) == 2, said.err
        assert "has run" not in said.out and not (tmp_path / "run").exists()


def test_what_cannot_be_told_is_asked_for(students, teacher, tmp_path):
    tensors, run = students(**HYBRID), tmp_path / "run"
    with pytest.raises(UserError, match="does not say whether it rotates") as refused:
        import_checkpoint(as_training(tensors, tmp_path / "x.pth"), str(teacher), run)
    assert "--attention-rope" in refused.value.hint
    shards = as_shards(tensors, tmp_path / "shards")
    (shards / "config.json").unlink()
    with pytest.raises(UserError, match="does not say whether it rotates"):
        import_checkpoint(shards, str(teacher), run)
    assert import_checkpoint(shards, str(teacher), run, attention_rope=True).attention_rope
    with pytest.raises(UserError, match="did you mean cxa079"):
        import_checkpoint(shards, str(teacher), tmp_path / "other", preset="cxa079x")


def test_layer_0_with_attention_is_refused_where_it_was_read(students, teacher, tmp_path):
    tensors = students(**HYBRID | {"attention_layers": [0]})
    with pytest.raises(UserError, match="layer 0 keeps attention"):
        import_checkpoint(
            as_training(tensors, tmp_path / "x.pth"), str(teacher), tmp_path / "run", attention_rope=False
        )
    found = import_checkpoint(as_infer(tensors, tmp_path / "y.pth"), str(teacher), tmp_path / "run")
    assert found.layout == "ARR" and same(tmp_path / "run", tensors)


def test_families_whose_mixers_differ_between_programs(students, tmp_path):
    from hybrid_cases import teacher as small

    small("phi3").save_pretrained(tmp_path / "phi3")
    file = as_infer(students(preset="cxa079"), tmp_path / "x.pth")
    with pytest.raises(UserError, match="the teacher's family is phi3") as refused:
        import_checkpoint(file, str(tmp_path / "phi3"), tmp_path / "run")
    assert "qwen3" in refused.value.hint and not (tmp_path / "run").exists()


def test_blocks_of_another_model(teacher, tmp_path):
    tensors = {"blocks.0.att.receptance.weight": torch.zeros(2, 2), "blocks.0.ffn.key.weight": torch.zeros(2, 2)}
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.key\.weight is no name of a converted model"):
        import_checkpoint(tmp_path / "x.pth", str(teacher), tmp_path / "run")


def test_configuration_of_another_teacher(students, teacher, tmp_path):
    shards = as_shards(students(**HYBRID), tmp_path / "shards")
    (shards / "config.json").write_text('{"rwkv_architecture": "hxa079", "head_dim": 64}')
    with pytest.raises(UserError, match="says head_dim = 64, the teacher has 8"):
        import_checkpoint(shards, str(teacher), tmp_path / "run")
    (shards / "config.json").write_text('{"mixer": {}}')
    with pytest.raises(UserError, match="is an export of this program"):
        import_checkpoint(shards, str(teacher), tmp_path / "run")
