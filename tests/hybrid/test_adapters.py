"""Adapters: no effect at the start, off when told, learn, merge exactly, and are what PEFT itself reads."""

import copy
import errno

import peft
import pytest
import torch
from torch import nn

from rwkvinside.errors import UserError
from rwkvinside.hybrid.adapters import (
    adapted,
    disabled,
    inject,
    is_adapter,
    is_start,
    learns_at_once,
    merge,
    module_of,
    write_peft,
)
from rwkvinside.hybrid.quantized_linear import dequantized, quantize
from rwkvinside.hybrid.settings import AdapterConfig
from rwkvinside.training.gradient_watch import GradientWatch

SPECS = {
    "lora": AdapterConfig(rank=4),
    "rslora": AdapterConfig(rank=4, rank_stabilized=True, alpha=3.0),
    "dora": AdapterConfig(rank=4, dora=True),
    "pissa": AdapterConfig(rank=4, init="pissa"),
    "rs-pissa": AdapterConfig(rank=4, init="pissa", rank_stabilized=True),
    "dropout": AdapterConfig(rank=4, dropout=0.5),
    "miss": AdapterConfig(kind="miss", rank=5),
    "bone": AdapterConfig(kind="bone", rank=4),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(48, 64), nn.Linear(64, 48, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu())


def adapter_tensors(model):
    named = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if is_adapter(name)}
    return {name: p.detach() for name, p in named.items()}


def freeze_rest(model):
    for name, p in model.named_parameters():
        p.requires_grad_(is_adapter(name) and not is_start(name))
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("format", [None, "nf4", "int8"])
@pytest.mark.parametrize("kind", SPECS)
def test_life_of_an_adapter(kind, format, tmp_path):
    spec, model = SPECS[kind], Block()
    if format is not None:
        quantize(model, ["up", "down"], format)
    x = torch.randn(3, 7, 48)
    with torch.no_grad():
        before = model(x)
    inject(model, spec, ["up", "down"])
    assert set(adapted(model)) == {"up", "down"}
    weights = freeze_rest(model)
    optimizer = torch.optim.SGD(weights, lr=0.05)
    with torch.no_grad():
        assert torch.allclose(model(x), before, atol=1e-6)  # PiSSA adds and subtracts the same product
    losses = []
    for _ in range(8):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = model(x)
        assert (trained - before).abs().max() > 1e-3
        with disabled(model):
            assert torch.equal(model(x), before)  # not nearly: the layer itself was never touched
        assert torch.equal(model(x), trained)

        tensors = adapter_tensors(model)
        assert {module_of(name) for name in tensors} == {"up", "down"}
        write_peft(tmp_path / "adapter", spec, tensors)
        base = Block()
        for name, layer in adapted(model).items():
            plain = layer.base_layer if format is None else dequantized(layer.base_layer)
            setattr(base, name, copy.deepcopy(plain))
            layer.base_layer = plain
        merge(model)
        assert type(model.up) is nn.Linear
        assert torch.allclose(model(x), trained, atol=1e-6)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.allclose(loaded(x), trained, atol=1e-6)
        assert torch.allclose(loaded.merge_and_unload()(x), trained, atol=2e-6)
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_pissa_starts_from_the_decomposition_that_peft_makes():
    ours = Block()
    ours.up.weight.data = torch.randn(64, 4) @ torch.diag(torch.tensor([8.0, 4, 2, 1])) @ torch.randn(4, 48)
    ours.up.weight.data += 0.01 * torch.randn(64, 48)
    theirs = copy.deepcopy(ours)
    weight = ours.up.weight.detach().clone()
    inject(ours, SPECS["pissa"], ["up"])
    assert torch.equal(ours.up.base_layer.weight, weight)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up"], init_lora_weights="pissa")
    theirs = peft.inject_adapter_in_model(config, theirs)
    # PEFT moves the principal part out of the weight; ours is subtracted by a second adapter. Same sum, same part
    part = ours.up.scaling["default"] * ours.up.lora_B["default"].weight @ ours.up.lora_A["default"].weight
    assert torch.allclose(weight - part, theirs.up.base_layer.weight, atol=1e-4)
    assert torch.equal(ours.up.lora_A["start"].weight, ours.up.lora_A["default"].weight)
    assert ours.up.scaling["start"] == -ours.up.scaling["default"]


def test_several_kinds_side_by_side():
    model = Block()
    inject(model, SPECS["lora"], ["up"])
    inject(model, SPECS["miss"], ["down"])
    freeze_rest(model)
    model(torch.randn(4, 48)).square().sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"up.lora_B.default.weight", "down.miss_block.default"}


def test_disabled_spares_what_it_is_told_to():
    model = nn.ModuleDict({"student": Block(), "other": Block()})
    inject(model, SPECS["miss"], ["student.up", "other.up"])
    for p in (p for n, p in model.named_parameters() if is_adapter(n)):
        p.data.fill_(0.1)
    x = torch.randn(2, 48)
    on = {name: block(x) for name, block in model.items()}
    with disabled(model, but="student"):
        assert torch.equal(model["student"](x), on["student"])
        assert not torch.allclose(model["other"](x), on["other"])
    assert all(p.requires_grad for n, p in model.named_parameters() if is_adapter(n))


def test_dropout_is_for_training_only():
    model = Block().eval()
    inject(model, SPECS["dropout"], ["up"])
    model.up.lora_B["default"].weight.data.normal_()
    x = torch.randn(2, 48)
    assert not torch.equal(model(x), model(x))
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    "spec, message",
    [
        (AdapterConfig(kind="miss", rank=4, dora=True), "dora is a form of lora, not of miss"),
        (AdapterConfig(kind="bone", rank=4, rank_stabilized=True), "rank_stabilized is a form of lora"),
        (AdapterConfig(kind="bone", rank=4, init="pissa"), "pissa does not go with bone"),
        (AdapterConfig(rank=4, init="pissa", dora=True), "pissa does not go with dora or dropout"),
        (AdapterConfig(kind="miss", rank=4, alpha=2.0), "miss has no alpha"),
        (AdapterConfig(kind="bone", rank=5), "block size 5 does not divide up"),
        (AdapterConfig(rank=49), r"rank 49 is more than up has \(48\)"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(UserError, match=message):
        inject(Block(), spec, ["up"])


class Step:
    """Reaches `up` only, or both layers."""

    def __init__(self, both):
        self.both = both

    def count(self, batch):
        return len(batch)

    def __call__(self, model, batch):
        return (model(batch) if self.both else model.up(batch)).square().sum(), {}


@pytest.mark.parametrize("both", [True, False])
def test_adapters_that_get_no_gradient_are_named(both):
    model = Block()
    inject(model, SPECS["lora"], ["up", "down"])
    freeze_rest(model)
    watched = {name: p for name, p in model.named_parameters() if learns_at_once(name)}
    step = GradientWatch(Step(both), watched)
    empty, batch = torch.zeros(0, 48), torch.randn(2, 48)
    for each in (empty, empty, batch):  # nothing is judged before something counted
        step(model, each)[0].backward()
    if both:
        step(model, batch)[0].backward()
        assert not step._hooks
    else:
        with pytest.raises(UserError, match="1 of 2 adapters got no gradient in the first step, first down.lora_B"):
            step(model, batch)


def test_no_space_for_an_adapter_is_one_clear_line(tmp_path, monkeypatch):
    def full(tensors, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    model = Block()
    inject(model, SPECS["lora"], ["up"])
    with pytest.raises(UserError, match="cannot write .*adapter: .*No space left on device"):
        write_peft(tmp_path / "adapter", SPECS["lora"], adapter_tensors(model))
    assert not list(tmp_path.iterdir())
