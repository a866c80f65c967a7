"""From the settings of a model that is trained from nothing to a run: shapes, knobs, plans, refusals."""

import pytest
import torch

import train_rwkv
from rwkvinside.config.resolve import resolve
from rwkvinside.errors import UserError
from rwkvinside.lm.build import load_lm_config
from rwkvinside.planning.plan import meta_student

SEED = [
    "--output_dir",
    "./outputs/rwkv_3b",
    "--experiment_name",
    "valkyrie_rwkv_3b",
    "--train_file",
    "data/train.txt",
    "--val_file",
    "data/val.txt",
    "--max_seq_length",
    "16384",
    "--seed",
    "42",
]


def parameters(config):
    """Parameters of the model that a configuration describes, built on the meta device."""
    return sum(p.numel() for p in meta_student(resolve(config).settings).canonical_parameters().values())


def plan_of(capsys, *arguments):
    assert train_rwkv.main([*arguments, "--dry_run"]) == 0
    return capsys.readouterr().out


def test_the_plan_of_the_large_hybrid(capsys):
    plan = plan_of(capsys, *SEED, "--ranks", "8", "device=cuda")
    assert "2.851 B parameters, from nothing" in plan and "layers    " + "RA" * 16 in plan
    assert "into outputs/rwkv_3b/valkyrie_rwkv_3b" in plan and "rows of 16384" in plan
    assert "8 ranks, DeepSpeed, ZeRO 2" in plan and "GiB a rank" in plan and '"stage": 2' in plan
    assert r".*\.w0 0.0008" in plan  # the decay's bias, as RWKV-7's own code


@pytest.mark.parametrize("name, stated", [("model_3b", 2.795e9), ("model_3b_rwkv", 2.851e9)])
def test_parameters_are_the_stated_ones(name, stated):
    assert parameters(load_lm_config(name)) == pytest.approx(stated, rel=0.01)


def test_the_command_of_the_large_model_fits_the_small_one(capsys):
    plan = plan_of(capsys, *SEED, "--config", "configs/lm/tiny.yaml")
    assert "steps     123 of 1 rows (16384 tokens)" in plan and "vocabulary 320" in plan


def test_flags_and_overrides_reach_the_run(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("tokenizer: bytes\nmodel: {hidden_size: 64, num_hidden_layers: 3, num_attention_heads: 2}\n")
    overrides = ["model.fields={rope_parameters: {rope_type: default, rope_theta: 5000.0}}", "seed=9"]
    config = load_lm_config(
        str(file), train=["a.txt"], val=["b.txt"], out="r", max_seq_length=48, seed=8, overrides=overrides
    )
    assert (config.data.train, config.data.val, config.out, config.seed) == (["a.txt"], ["b.txt"], "r", 9)
    fields = config.teacher.config
    assert fields["rope_parameters"]["rope_theta"] == 5000 and fields["max_position_embeddings"] == 48
    assert (fields["head_dim"], fields["intermediate_size"], fields["num_key_value_heads"]) == (32, 192, 2)
    assert (fields["vocab_size"], fields["eos_token_id"]) == (320, 256) and config.data.end_of_text
    stage = config.stages["pretrain"]
    assert stage.data.seq_len == 48 and stage.optim.weight_decay == 0.1 and config.run == ["pretrain"]


def test_without_rwkv_it_is_the_transformer():
    config = load_lm_config("tiny", overrides=["use_rwkv=false"])
    student = meta_student(resolve(config).settings)
    assert student.rwkv_layers == [] and not student.mixer_names()


KNOBS = {
    "rwkv_time_mix_ratio=0.25": "shift_ratio",
    "rwkv_use_linear_att=true": "linear_attention",
    "rwkv_att_scale=2": "output_scale",
    "rwkv_chunk_size=64": "chunk_size",
}


@pytest.mark.parametrize("knob, field", KNOBS.items())
def test_every_knob_reaches_the_student(knob, field):
    usual, changed = load_lm_config("tiny").student, load_lm_config("tiny", overrides=[knob]).student
    differing = {name for name in type(usual).model_fields if getattr(usual, name) != getattr(changed, name)}
    assert differing == {field}


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["use_rwkv=false", "rwkv_att_scale=2"], "would change nothing: use_rwkv is false"),
        (["student.preset=cxa079", "rwkv_time_mix_ratio=0.5"], "mixer cxa079 has no token shift"),
        (["student.preset=cxa079", "rwkv_use_linear_att=true"], "has no group norm"),
        (["rwkv_att_scale=0"], "rwkv_att_scale = 0: must be greater than 0"),
        (["rwkv_time_mix_ratio=1.5"], "less than or equal to 1"),
        (["rwkv_chunk_size=0"], "rwkv_chunk_size = 0"),
        (["rwkv_chunks=8"], "rwkv_chunks: unknown key; did you mean rwkv_chunk_size"),
        (
            ["rwkv_layer_indices=[0,2]"],
            "here it is student.attention_layers, which names the other layers",
        ),
        (["max_seq_length=8"], "here it is stages.pretrain.data.seq_len"),
        (["model.hiden_size=8"], "did you mean model.hidden_size"),
        (["model.family=lama"], "did you mean 'llama'|did you mean llama"),
        (["model.num_attention_heads=3"], "does not divide hidden_size 128"),
        (["model.fields.tie_word_embeddings=true"], "training keeps two matrices"),
        (["student.attention_layers=[0,9]"], "has layer 9, but there are layers 0 to 3"),
        (["student.attention_layers=0-3"], "leaves no layer to RWKV"),
        (["student.attention_layers={choose: restore, keep: 2}"], "measures a converted model"),
        (["student.init=calibrated"], "go together"),
        (["tokenizer=no/such/dir"], r"tokenizer no/such/dir cannot be loaded(.|\n)*give tokenizer=DIR"),
    ],
)
def test_what_cannot_be_is_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        load_lm_config("tiny", overrides=overrides)


def test_unknown_models_are_named():
    with pytest.raises(UserError, match=r"neither a file nor a shipped model(.|\n)*tiny"):
        load_lm_config("tinny")


def test_rows_go_on_only_where_the_state_has_a_constant_size(capsys):
    assert train_rwkv.main(["--config", "tiny", "--dry_run", "stages.pretrain.stateful=true"]) == 2
    assert "attention of layers 1, 3 would keep all tokens" in capsys.readouterr().err
    plan = plan_of(capsys, "--config", "tiny", "stages.pretrain.stateful=true", "student.attention_window=64")
    # 16 rows of 2 x 4 heads of 32 x 32 numbers with the last input, and 2 x 2 x 64 keys and values of width 128, twice
    assert "goes on from step to step in 16 streams, 161 KiB each" in plan and "row states 5.03 MiB" in plan
    with pytest.raises(UserError, match="objective sft begins every row anew"):
        load_lm_config("tiny", overrides=["run=[pretrain,sft]", "stages.sft.stateful=true"])


@pytest.mark.parametrize("stage", ["calibrate", "align", "distill"])
def test_stages_that_need_a_teacher_are_refused(stage):
    config = load_lm_config("tiny", overrides=[f"run=[pretrain,{stage}]"])
    plan = resolve(config)
    student = meta_student(plan.settings)
    with pytest.raises(UserError, match="trained from nothing|needs the teacher's own weights"):
        for one in plan.stages:
            one.stage.prepare(student, one, one.phases[-1].train)


def test_sft_follows_pretraining(capsys):
    assert "pretrain -> sft" in plan_of(capsys, "--config", "tiny", "run=[pretrain,sft]", "stages.sft.data.seq_len=64")


def test_a_converted_model_is_not_pretrained(tmp_path):
    from tiny import save_configuration

    from rwkvinside.config.load import load_config

    config = load_config(
        teacher=save_configuration(tmp_path / "t"), overrides=["stages.p.objective=pretrain", "run=[p]"]
    )
    plan = resolve(config)
    with pytest.raises(UserError, match="this one has a teacher"), torch.device("meta"):
        plan.stages[0].stage.prepare(meta_student(plan.settings), plan.stages[0], [".*"])
