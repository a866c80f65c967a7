import pytest
import torch
from toy_training import SETTINGS, Losses, Source, ToyStep, local_engine, model, trainer

from rwkvinside.errors import UserError
from rwkvinside.training.deepspeed_engine import DeepSpeedEngine, LocalEngine
from rwkvinside.training.optimizer import build_optimizer, decays, fresh_state, trainable
from rwkvinside.training.process_group import Distributed
from rwkvinside.training.settings import OptimConfig


def test_weight_decay_is_for_weights_of_layers_and_embeddings():
    groups = model().groups()
    optimizer = build_optimizer(groups, SETTINGS)
    names = {id(p): name for name, p in trainable(groups).items()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {"embed.weight", "mixer.weight", "head.weight"}  # not `rare`, a table that is no layer's weight
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(trainable(groups))
    assert {g["group"] for g in optimizer.param_groups} == {"mixer", "rest"}
    assert not decays("w0", torch.zeros(1, 1, 8)) and decays("experts.down_proj", torch.zeros(2, 4, 8))


def test_one_step_is_adamw_on_the_clipped_mean():
    """Against plain torch, written out: mean over all items, clipping of the global norm, one rate for each group."""
    engine, plain = local_engine(dropout=0.0), model(dropout=0.0)
    batches = [Source().batch(range(3)), Source().batch(range(3, 8))]
    step = ToyStep()
    count = sum(step.count(b) for b in batches)
    engine.set_rates({"mixer": 0.1, "rest": 0.01})
    result = engine.train_step(batches, step, count)

    (sum(step(plain, b)[0] for b in batches) / count).backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.grad is not None], SETTINGS.clip)
    for group, rate in (("mixer", 0.1), ("rest", 0.01)):
        for name, parameter in plain.groups()[group].items():
            decay = SETTINGS.weight_decay if decays(name, parameter) else 0.0
            torch.optim.AdamW([parameter], lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay).step()
    assert norm > SETTINGS.clip and result.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for name, value in engine.full_parameters().items():
        # Adam's first step is the sign of the gradient: only rounding of tiny gradients can differ
        torch.testing.assert_close(value, plain.get_parameter(name).detach(), rtol=0, atol=1e-5)


def test_without_clipping_the_norm_is_still_reported():
    engine = local_engine(dropout=0.0)
    toy = model(dropout=0.0)
    free = LocalEngine(toy, toy.groups(), OptimConfig(clip=0.0), Distributed("cpu"))
    batch = [Source().batch(range(4))]
    a = engine.train_step(batch, ToyStep(), 20)
    b = free.train_step(batch, ToyStep(), 20)
    assert a.grad_norm == b.grad_norm > SETTINGS.clip


def test_optimizer_state_goes_round():
    engine = local_engine()
    assert all(not t.any() for t in engine.optimizer_state().values())
    trainer(engine).fit()
    state = engine.optimizer_state()
    assert int(state["scale/step"]) == 8 and state["mixer.weight/exp_avg"].any()
    other = local_engine()
    other.load_optimizer_state(state)
    assert all(torch.equal(v, state[k]) for k, v in other.optimizer_state().items())
    del state["scale/exp_avg"]
    with pytest.raises(UserError, match="scale/exp_avg is missing"):
        other.load_optimizer_state(state)


class WithoutDeepSpeed(DeepSpeedEngine):
    """What it needs to load an optimizer state, made by hand: no processes, and no shards to write moments into."""

    def __init__(self, toy):
        self._groups = toy.groups()
        self.trainable, self.zero_stage = trainable(self._groups), 1
        self._optimizer, self._wrapped = build_optimizer(self._groups, SETTINGS), None
        self._optimizer.state.update({flat: fresh_state(flat) for _, flat in self._flats()})

    def _set_full(self, parameter, full, moment):
        pass


def test_deepspeed_refuses_different_numbers_of_updates_in_a_group():
    """It has one number for a whole partition of a group, and Adam would correct its bias wrongly."""
    first = local_engine()
    trainer(first).fit()
    state, engine = first.optimizer_state(), WithoutDeepSpeed(model())
    groups = model().groups()
    state |= {f"{name}/step": torch.tensor(3) for name in groups["mixer"]}
    engine.load_optimizer_state(state)
    assert {(tuple(names), int(own["step"])) for names, own in engine._flat_states()} == {
        (tuple(groups["mixer"]), 3),
        (tuple(groups["rest"]), 8),
    }
    name = next(iter(groups["rest"]))
    with pytest.raises(UserError, match="trained together have made 5, 8 updates\nunder DeepSpeed resume with"):
        engine.load_optimizer_state(state | {f"{name}/step": torch.tensor(5)})
    late = {key: value for key, value in state.items() if key.rpartition("/")[0] != name}
    with pytest.raises(UserError, match="have made 0, 8 updates"):  # it joins a group that has trained
        engine.load_optimizer_state(late, absent=[name])


def test_bf16_computes_in_bf16_over_fp32_masters():
    toy = model(dropout=0.0).bfloat16()
    engine = LocalEngine(toy, toy.groups(), SETTINGS, Distributed("cpu"), "bf16")
    assert toy.mixer.weight.dtype == torch.float32 and toy.frozen.weight.dtype == torch.bfloat16
    kinds = []
    toy.mixer.register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    losses, exact = Losses(), Losses()
    trainer(engine, metrics=losses).fit()
    assert set(kinds) == {torch.bfloat16}
    trainer(local_engine(dropout=0.0), metrics=exact).fit()
    # 8 bits of mantissa: 2^-9 relative for each rounding, a few of them in a row
    assert losses["loss"] == pytest.approx(exact["loss"], rel=2e-2)
    assert losses["loss"] != exact["loss"]


def test_refusals():
    with pytest.raises(UserError, match="fp16"):
        local_engine(precision="fp16")
    with pytest.raises(UserError, match="trains no parameter"):
        trainable({"mixer": {}, "rest": {}})
