"""What DeepSpeed is told: from the configuration alone, and with a configuration of the user's own."""

import pytest

from rwkvinside.errors import UserError
from rwkvinside.training.batching import StepShape
from rwkvinside.training.deepspeed_config import deepspeed_config, settle
from rwkvinside.training.settings import DeepSpeedConfig, OptimConfig

SHAPE = StepShape(rows=12, micro_rows=2, ranks=2)
AUTO = {  # as it is written for trainers that fill in "auto"
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "reduce_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "overlap_comm": True,
    },
    "wall_clock_breakdown": False,
}


def config(user=None, precision="fp32", settings=None, shape=SHAPE, **zero):
    return deepspeed_config(DeepSpeedConfig(config=user, **zero), settings or OptimConfig(), precision, shape)


@pytest.mark.parametrize(
    "rows, micro_rows, ranks, micro_batches",
    [(12, 2, 2, 3), (7, 2, 2, 2), (7, 2, 3, 2), (7, 3, 3, 1), (4, 1, 4, 1)],
)
def test_every_rank_has_the_same_number_of_micro_batches(rows, micro_rows, ranks, micro_batches):
    shape = StepShape(rows, micro_rows, ranks)
    assert shape.micro_batches == micro_batches
    shares = [len(range(rank, rows, ranks)) for rank in range(ranks)]
    assert max(-(-share // micro_rows) for share in shares) == micro_batches


def test_the_configuration_alone():
    found = config(zero_stage=3, offload_optimizer=True, offload_parameters=True, settings=OptimConfig(clip=0.5))
    assert found["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
    assert found["train_micro_batch_size_per_gpu"] == 2 and found["gradient_accumulation_steps"] == 3
    assert found["gradient_clipping"] == 0.5 and "bf16" not in found and "torch_autocast" not in found


def test_bf16_is_autocast_unless_bf16_weights_are_asked_for():
    assert config(precision="bf16")["torch_autocast"] == {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    ours = config(precision="bf16", bf16_weights=True, zero_stage=0)
    for found in (ours, config({"bf16": {"enabled": True}}, "bf16")):
        assert found["bf16"]["enabled"] and "torch_autocast" not in found and found["zero_optimization"]["stage"] == 1
    assert "bf16" not in config(precision="fp32", bf16_weights=True)


def test_a_file_takes_over_its_sections_and_auto_is_filled_in():
    found = config(AUTO, "bf16", zero_stage=1, offload_optimizer=True)
    assert found["zero_optimization"] == {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
    }
    assert found["wall_clock_breakdown"] is False and found["train_micro_batch_size_per_gpu"] == 2
    assert found["torch_autocast"]["enabled"] and not {"bf16", "fp16", "optimizer", "scheduler"} & found.keys()


def test_what_a_file_says_of_sharding_is_known_to_the_plan():
    found = settle(DeepSpeedConfig(zero_stage=1, offload_optimizer=True, config=AUTO))
    settled = found.zero_stage, found.offload_optimizer, found.offload_parameters, found.bf16_weights
    assert settled == (3, False, True, False)
    zero = DeepSpeedConfig(zero_stage=2, offload_optimizer=True)
    assert settle(zero.model_copy(update={"config": {"bf16": {"enabled": True}}})).bf16_weights
    assert settle(zero) == zero


def test_a_file_without_a_stage_is_added_to_ours():
    found = config({"zero_optimization": {"overlap_comm": True}}, zero_stage=2, offload_optimizer=True)
    assert found["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True}


def test_a_file_may_repeat_the_configuration():
    same = {"train_batch_size": 12, "gradient_accumulation_steps": 3, "gradient_clipping": 1.0}
    adam = {"type": "Adam", "params": {"betas": [0.9, 0.95], "weight_decay": 0.0}}
    assert config(same | {"optimizer": adam}) == config()


@pytest.mark.parametrize(
    "user, said",
    [
        ({"train_batch_size": 8}, "train_batch_size=8, the configuration gives 12"),
        ({"train_micro_batch_size_per_gpu": 4}, "the configuration gives 2"),
        ({"gradient_clipping": 0.1}, "gradient_clipping=0.1"),
        ({"bf16": {"enabled": True}}, "enables bf16, the configuration's precision is fp32"),
        ({"fp16": {"enabled": True}}, "enables fp16"),
        ({"bf16": True}, "bf16=True"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type='Lion'"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "optimizer.params.lr=0.0001"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}}, "optimizer.params.betas"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, "warmup_num_steps"),
        ({"zero_optimization": {"stage": 4}}, "ZeRO stage 4"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs ZeRO 3, not 2"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "'nvme'"),
    ],
)
def test_contradictions_are_refused(user, said):
    with pytest.raises(UserError) as caught:
        config(user)
    assert said in caught.value.cause and caught.value.hint


def test_offloading_needs_sharding():
    with pytest.raises(UserError, match="needs ZeRO"):
        config(zero_stage=0, offload_optimizer=True)
    with pytest.raises(UserError, match="needs ZeRO 3, not 2"):
        config(zero_stage=2, offload_parameters=True)
    with pytest.raises(UserError, match="combines bf16 with ZeRO 0"):
        config({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "bf16")


def test_8_bit_states_are_not_sharded():
    settings = OptimConfig(kind="adamw8bit")
    with pytest.raises(UserError, match="adamw8bit cannot be sharded"):
        config(settings=settings, zero_stage=1)
    assert config(settings=settings, zero_stage=0)["zero_optimization"]["stage"] == 0


def test_null_and_none_offload_nothing():
    for nothing in (None, {"device": "none"}, "auto"):
        section = {"stage": 0, "offload_optimizer": nothing, "offload_param": nothing}
        settled = settle(DeepSpeedConfig(config={"zero_optimization": section}))
        assert (settled.zero_stage, settled.offload_optimizer, settled.offload_parameters) == (0, False, False)
        assert config({"zero_optimization": section})["zero_optimization"]["stage"] == 0


@pytest.mark.parametrize("user", [{"zero_optimization": 3}, {"zero_optimization": {"offload_param": "cpu"}}])
def test_a_section_must_be_a_mapping(user):
    for read in (config, lambda section: settle(DeepSpeedConfig(config=section))):
        with pytest.raises(UserError, match="it must be a mapping of settings"):
            read(user)
