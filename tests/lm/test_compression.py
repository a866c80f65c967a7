"""A state in fewer bytes and in a file: what it costs, that it goes on as before, and what is refused."""

import json
import re

import pytest
import torch
from generation_cases import VOCAB, build, greedy
from safetensors import safe_open
from safetensors.torch import save_file

from rwkvinside.errors import UserError
from rwkvinside.lm.cache_parts import named_parts
from rwkvinside.lm.compression import HEADER, CompressedState, _compress, model_identity
from rwkvinside.lm.session import StatefulModel

CASES = {
    "attention-and-rwkv": {},
    "window": {"mixer": {"window": 4, "sinks": 1}, "rwkv_layers": (0, 1, 2, 3)},
    "cut-attention": {"attention_window": 6, "attention_sinks": 2},
    "token-shift": {"family": "llama", "preset": "x070", "rwkv_layers": (0, 2)},
    "sliding": {"family": "mistral", "rwkv_layers": (0, 2), "sliding_window": 6},
}


def tokens(rows=1, length=24, seed=5):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model, ids):
    with torch.no_grad():
        return model.process_with_state(ids)[1]


@pytest.fixture(scope="module", params=CASES)
def model(request):
    return StatefulModel(build(**CASES[request.param], dtype=torch.float32))


def test_bytes(model):
    state = read(model, tokens())
    sizes = {name: CompressedState.of(state, name).nbytes for name in ("exact", "fp16", "int8")}
    floats = sum(x.nbytes for _, x in named_parts(state) if x.ndim > 1)
    rest = sizes["exact"] - floats
    rows = sum(x[..., 0].numel() for _, x in named_parts(state) if x.ndim > 1)
    assert CompressedState.of(state).original_bytes == sizes["exact"]
    assert sizes["fp16"] == floats // 2 + rest and rest < 64
    assert sizes["int8"] == floats // 4 + 4 * rows + rest


def test_heads_of_64_take_a_little_more_than_a_quarter():
    x = torch.randn(1, 12, 64, 64)
    assert sum(part.nbytes for part in _compress("s", x, "int8").values()) / x.nbytes == 68 / 256


def test_rounding_is_as_fine_as_the_format(model):
    state = read(model, tokens())
    for name, bound in (("exact", 0), ("fp16", 2**-11), ("int8", 0.5 / 127 + 1e-6)):
        restored = dict(named_parts(CompressedState.of(state, name).restore()))
        for part, x in named_parts(state):
            assert restored[part].dtype == x.dtype and restored[part].shape == x.shape
            if x.ndim > 1:
                error = (restored[part] - x).abs() / x.abs().amax(-1, keepdim=True).clamp(min=1e-9)
                assert error.max() <= bound and (bound == 0) == (error.max() == 0), part
            else:
                assert torch.equal(restored[part], x)


def test_a_conversation_goes_on_from_a_file(model, tmp_path):
    ids, more = tokens(), tokens(length=9, seed=6)
    state = read(model, ids)
    file = tmp_path / "state.safetensors"
    turns = [{"role": "user", "content": "naïve?"}]
    CompressedState.of(state, "exact").save(file, model.model, notes={"messages": turns})
    restored, notes = CompressedState.load(file, model.model)
    assert notes == {"messages": turns} and [path.name for path in tmp_path.iterdir()] == [file.name]
    everything = torch.cat([ids, more], 1)
    expected = greedy(model.model, everything)
    assert torch.equal(greedy(model.model, everything, past_key_values=restored.restore()), expected)
    with torch.no_grad():
        outputs = [model.process_with_state(more, s)[0].logits for s in (state, restored.restore(), restored.restore())]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_files_of_compressed_states_give_the_same_bits(model, kind, tmp_path):
    packed = CompressedState.of(read(model, tokens(rows=3)), kind)
    packed.save(tmp_path / "s", model.model)
    loaded = CompressedState.load(tmp_path / "s", model.model)[0]
    assert loaded.nbytes == packed.nbytes and loaded.original_bytes == packed.original_bytes
    parts = zip(named_parts(packed.restore()), named_parts(loaded.restore()), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in parts)


def test_another_model_or_a_changed_file_is_refused(tmp_path):
    model, file = StatefulModel(build(dtype=torch.float32)), tmp_path / "s"
    CompressedState.of(read(model, tokens())).save(file, model.model, {"note": "yes"})

    def refused(path, cause, reader=model.model):
        with pytest.raises(UserError, match=cause) as error:
            CompressedState.load(path, reader)
        assert "\n" not in error.value.cause

    trained = build(dtype=torch.float32)
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(1e-4 * torch.randn_like(p))
    refused(file, "state of another model", trained)
    refused(file, "state of another model", build(rwkv_layers=(1, 2), dtype=torch.float32))
    refused(tmp_path / "none", "there is no state at")

    with safe_open(file, "pt") as opened:
        header, parts = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    other = tmp_path / "other"
    save_file(parts, other)
    refused(other, "is no saved state")
    save_file(parts, other, {HEADER: re.sub('"yes"', '"no"', header[HEADER])})
    refused(other, "cannot be trusted: it was changed")
    save_file({name: x + (x.ndim > 1) for name, x in parts.items()}, other, header)
    refused(other, "are not those that were saved")
    other.write_bytes(file.read_bytes()[:-10])
    refused(other, "cannot be read as a state")
    other.write_text(json.dumps({"a": 1}))
    refused(other, "cannot be read as a state")


def test_what_cannot_be_compressed_is_refused():
    model = StatefulModel(build(dtype=torch.float32))
    with pytest.raises(UserError, match="has read nothing yet"):
        CompressedState.of(model.state)
    state = read(model, tokens())
    with pytest.raises(UserError, match="format of a state is 'int4'"):
        CompressedState.of(state, "int4")
    state.layers[0].state.wkv[0, 0, 0, 0] = 1e5
    with pytest.raises(UserError, match="0.state.wkv of the state has values beyond fp16"):
        CompressedState.of(state, "fp16")
    CompressedState.of(state, "int8")
    state.layers[0].state.wkv[0, 0, 0, 0] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        CompressedState.of(state, "int8")


def test_a_model_is_told_by_its_weights_wherever_it_is_from(tmp_path):
    model = build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert model_identity(again) == model_identity(model)
