"""Phases, learning-rate groups and the table of what trains, on a tiny student."""

import pytest
import torch
from plans import stage_plan
from pydantic import ValidationError
from transformers import Qwen3Config, Qwen3ForCausalLM

from rwkvinside.errors import UserError
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.stages.param_groups import joined, rate_groups
from rwkvinside.stages.summary import training_lines, training_table
from rwkvinside.training.schedule import StageLength


def make_stage(train=("mixer.lora",), unfreeze=(), rates=None, **changes):
    values = {
        "objective": "distill",
        "tokens": 1000,
        "train": list(train),
        "unfreeze": [{"at_tokens": tokens, "train": patterns} for tokens, patterns in unfreeze],
        "data": {"seq_len": 10},
        "batch": {"tokens": 20},
        "optim": {"lr": 1e-3, "lr_rest": 1e-4, "lr_final": 1e-5, "warmup_steps": 4, "rates": rates or {}},
        "loss": {},
    }
    return stage_plan(**values | changes)


@pytest.fixture(scope="module")
def student():
    sizes = dict(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=50,
    )
    with torch.device("meta"):
        teacher = Qwen3ForCausalLM(Qwen3Config(**sizes))
    return HybridModel.from_teacher(teacher, StudentConfig(attention_layers=(2,)))


def test_one_phase_where_nothing_unfreezes():
    (phase,) = make_stage().phases
    assert (phase.index, phase.first, phase.until, phase.train) == (0, 0, 50, ("mixer.lora",))


def test_phases_are_cut_at_steps():
    unfreeze = [(401, ["mlp"]), (100, ["mixer.proj"]), (409, ["norms", "mlp"])]
    found = make_stage(unfreeze=unfreeze).phases
    # steps have 20 tokens: 100 is where step 6 begins; 401 and 409 lie in step 21, so both join with step 22
    assert [(p.first, p.until, p.tokens) for p in found] == [(0, 5, 0), (5, 21, 100), (21, 50, 401)]
    assert found[1].train == ("mixer.lora", "mixer.proj")
    assert found[2].train == ("mixer.lora", "mixer.proj", "mlp", "norms")


def test_unfreezing_at_the_end_is_refused():
    assert make_stage(unfreeze=[(980, ["mlp"])]).phases[1].first == 49
    with pytest.raises(ValidationError, match="at_tokens 981 is after 980"):
        make_stage(unfreeze=[(981, ["mlp"])])
    with pytest.raises(ValidationError, match="leave out optim, train and unfreeze"):
        make_stage([], [(1, ["mlp"])], objective="calibrate", optim=None, loss=None)


def test_rates_fall_from_layer_to_layer_and_may_be_multiples(student):
    optim = {"lr": 1e-3, "lr_rest": 1e-4, "lr_final": 1e-5, "warmup_steps": 4, "layer_decay": 0.5}
    optim |= {"rates": {"attention": "0.5x", "mlp": 1e-4}}
    stage = make_stage(["mixer", "attention", "mlp", "embed", "head"], optim=optim)
    student.set_trainable(stage.phases[0].train)
    groups = rate_groups(student, stage, stage.phases[0])
    rate_of = {name: group.rate for group in groups.values() for name in group.parameters}
    at = "model.layers.{}.{}".format
    assert rate_of[at(1, "self_attn.w1")] == 0.5e-3 and rate_of[at(0, "self_attn.w1")] == 0.25e-3
    assert rate_of[at(2, "self_attn.q_proj.weight")] == 0.5e-3, "half of the mixers' rate, in the last layer"
    assert [rate_of[at(i, "mlp.up_proj.weight")] for i in (2, 1, 0)] == [1e-4, 0.5e-4, 0.25e-4]
    assert rate_of["lm_head.weight"] == 1e-4 and rate_of["model.embed_tokens.weight"] == pytest.approx(1e-4 / 8)
    assert {group.label for group in groups.values()} == {"mixer", "attention", "mlp", "rest"}
    assert sum(len(group.parameters) for group in groups.values()) == len(rate_of), "each in one group"
    lines = "\n".join(training_lines(student, stage, []))
    assert "mixer 0.00025 to 0.0005, attention 0.0005, mlp 2.5e-05 to 0.0001" in lines
    assert "times 0.5 from layer to layer down" in lines and "2.5e-05 to 0.0001" in lines.split("\nmlp")[1]


def test_rates_and_when_they_begin(student):
    rates = {r".*\.w[012]": 3e-3, "mixer.lora": 2e-3, "norms": 5e-5}
    stage = make_stage(["mixer.lora", "head"], [(100, ["mixer.proj"]), (400, ["mlp", "norms"])], rates)
    first, second, third = stage.phases
    student.set_trainable(first.train)
    assert list(rate_groups(student, stage, first)) == [r".*\.w[012]", "mixer.lora", "rest"]
    groups = rate_groups(student, stage, third)
    assert {name: (g.rate, g.first) for name, g in groups.items()} == {
        r".*\.w[012]": (3e-3, 0),
        "mixer.lora": (2e-3, 0),
        "rest": (1e-4, 0),
        "mixer@100": (1e-3, 5),
        "norms@400": (5e-5, 20),
        "rest@400": (1e-4, 20),
    }
    assert set(groups["rest"].parameters) == {"lm_head.weight"}
    assert "model.layers.1.self_attn.w1" in groups[r".*\.w[012]"].parameters
    assert set(groups["norms@400"].parameters) == student.matching("norms")
    # what trains is what is in the groups, each parameter once
    for phase in (first, second, third):
        stage.stage.prepare(student, stage, phase.train)
        names = [n for g in rate_groups(student, stage, phase).values() for n in g.parameters]
        trained = {n for n, p in student.canonical_parameters().items() if p.requires_grad}
        assert len(names) == len(set(names)) and set(names) == trained
    assert joined(student, stage, first) == set()
    assert joined(student, stage, second) == student.matching("mixer.proj")
    assert joined(student, stage, third) == student.matching("mlp") | student.matching("norms")


def test_a_group_that_joins_has_a_warm_up_of_its_own(student):
    stage = make_stage(unfreeze=[(100, ["mlp"])])
    schedule = stage.schedule(rate_groups(student, stage, stage.phases[1]))
    length = StageLength(1000, 20, 10)
    full = schedule.rates(50, length)  # decays from the start to the end
    assert set(full) == {"mixer", "rest@100"}
    at = {step: schedule.rates(step, length) for step in (6, 7, 9, 10)}
    constant = {step: at[step]["mixer"] / 1e-3 for step in at}  # what the decay leaves of the rate
    for step, part in ((6, 1 / 4), (7, 2 / 4), (9, 1), (10, 1)):
        rest = 1e-5 + (1e-4 - 1e-5) * (constant[step] - 1e-2) / (1 - 1e-2)
        assert at[step]["rest@100"] == pytest.approx(part * rest)
    assert at[6]["mixer"] > at[7]["mixer"] > 0.9e-3


@pytest.mark.parametrize(
    "rates, said",
    [
        ({"attention": 1e-3}, "'attention' sets the rate of nothing that the stage trains"),
        ({"mixer": 1e-3, "mixer.lora": 1e-3}, "'mixer.lora' sets the rate of nothing"),
        ({"nonsense": 1e-3}, "'nonsense' matches no parameter"),
        ({"(": 1e-3}, r"is not a regular expression"),
    ],
)
def test_rates_of_nothing_are_refused(student, rates, said):
    stage = make_stage(rates=rates)
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        rate_groups(student, stage, stage.phases[0])


def test_rates_may_wait_for_what_joins_later(student):
    stage = make_stage(unfreeze=[(100, ["mlp"])], rates={"mlp": 1e-6})
    assert list(rate_groups(student, stage, stage.phases[0])) == ["mixer"]
    assert rate_groups(student, stage, stage.phases[1])["mlp@100"].rate == 1e-6


def test_unfreezing_what_trains_already_is_refused(student):
    stage = make_stage(["mixer"], [(100, ["mixer.lora"])])
    with pytest.raises(UserError, match="what joins after 100 tokens trains already"):
        rate_groups(student, stage, stage.phases[0])


def test_the_table(student):
    stage = make_stage(["mixer.lora", r"model\.layers\.0\.mlp\..*"], [(400, ["mlp"])], {"mlp": 1e-5})
    table = {line.split()[0]: line for line in training_table(student, stage, stage.phases[0])}
    counts = {group: all for group, _, all in student.group_table()}
    assert set(table) == {"group", *counts}
    assert table["mixer.lora"].split()[-2:] == ["0.001", "trains"]
    assert table["attention"].split()[-2:] == table["mixer.proj"].split()[-2:] == ["-", "frozen"]
    third = counts["mlp"] // 3
    assert table["mlp"].split(maxsplit=4)[3:] == [
        "1e-05",
        f"{third / 1e3:.4g} K trains, {2 * third / 1e3:.4g} K joins after 400 tokens",
    ]
    later = training_table(student, stage, stage.phases[1])
    assert [line.split()[-2:] for line in later if line.startswith("mlp")] == [["1e-05", "trains"]]
