"""Generation in fixed memory gives the tokens of stock `generate()`, by steps and by replays of a recorded graph."""

import pytest
import torch
from generation_cases import LAYOUTS, VOCAB, build
from recorded_graph import Capture, RecordedGraph
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache

from rwkvinside.modeling import graphed_decoding
from rwkvinside.modeling.graphed_decoding import generate_graphed
from rwkvinside.modeling.recurrent_cache import RecurrentLayer

NEW = 40
GREEDY = {"do_sample": False}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01}


@pytest.fixture(params=["steps", "replays"])
def graphs(request, monkeypatch):
    """All graphs that were made: none where the loop runs step by step."""
    made = []

    def graph():
        made.append(RecordedGraph())
        return made[-1]

    if request.param == "replays":
        monkeypatch.setattr(graphed_decoding, "can_capture", lambda device: True)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
    yield made
    if request.param == "replays":
        assert len(made) == 1 and made[0].replays > 5


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(2, VOCAB, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def padding(prompt):
    mask = torch.ones_like(prompt)
    mask[0, :7] = 0
    return mask


def both(model, prompt, **kwargs):
    """Tokens of stock `generate()` and of the graphed loop."""
    torch.manual_seed(3)
    expected = model.generate(prompt, max_new_tokens=NEW, **kwargs)
    torch.manual_seed(3)
    return expected, model.generate(prompt, max_new_tokens=NEW, custom_generate=generate_graphed, **kwargs)


@pytest.mark.parametrize("how", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("layers", [*LAYOUTS.values(), []], ids=[*LAYOUTS, "all-attention"])
def test_tokens_are_those_of_generate(layers, how, prompt, padding, graphs):
    expected, tokens = both(build("qwen3", layers), prompt, attention_mask=padding, **how)
    assert torch.equal(tokens, expected)
    assert expected[:, 21:].unique().numel() > 3, "a model that repeats one token would pass anything"


@pytest.mark.parametrize("family, preset", [("llama", "x070"), ("qwen2", "hxa07b"), ("qwen3", "cxa078")])
def test_families_and_presets(family, preset, prompt, graphs):
    """x070 has a second state, of its token shift."""
    expected, tokens = both(build(family, LAYOUTS["mixed"], preset), prompt, **GREEDY)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("window, sinks", [(6, 2), (200, 0)])
def test_windows_beside_the_recurrence(window, sinks, prompt, padding, graphs):
    model = build("qwen3", LAYOUTS["mixed"], mixer={"window": window, "sinks": sinks})
    expected, tokens = both(model, prompt, attention_mask=padding, **GREEDY)
    assert torch.equal(tokens, expected)


def test_rows_end_at_stop_tokens_and_are_filled_with_padding(prompt, padding, graphs):
    model = build("qwen3", LAYOUTS["mixed"])
    free = model.generate(prompt, max_new_tokens=NEW, attention_mask=padding, **GREEDY)
    rows = free[:, 21:].tolist()
    ends = {token: [row.index(token) if token in row else NEW for row in rows] for token in set(sum(rows, []))}
    stop = next(token for token, (a, b) in ends.items() if 12 < max(a, b) < NEW - 4 and abs(a - b) > 3)
    expected, tokens = both(model, prompt, attention_mask=padding, eos_token_id=[stop], pad_token_id=0, **GREEDY)
    assert torch.equal(tokens, expected)
    assert expected.shape[1] == 21 + max(ends[stop]) + 1
    assert (expected[:, -3:] == 0).all(1).any(), "one row has ended before the other"


def test_eager_attention(prompt, padding, graphs):
    model = build("llama", LAYOUTS["attention-first"])
    model.set_attn_implementation("eager")
    expected, tokens = both(model, prompt, attention_mask=padding, **GREEDY)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [6, 200])
@pytest.mark.parametrize("layout", ["mixed", "attention-first"])
def test_kept_layers_with_a_sliding_window(layout, window, implementation, prompt, padding, graphs):
    """Shorter than the prompt, and longer than everything."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    fields = {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
    model = build("qwen2", LAYOUTS[layout], **fields)
    model.set_attn_implementation(implementation)
    expected, tokens = both(model, prompt, attention_mask=padding, **GREEDY)
    assert torch.equal(tokens, expected)


def test_a_prompt_that_is_shorter_than_the_window(graphs):
    fields = {"use_sliding_window": True, "sliding_window": 12, "layer_types": ["sliding_attention"] * 4}
    model = build("qwen2", [1, 2], **fields)
    expected, tokens = both(model, torch.tensor([[5, 6, 7], [8, 9, 10]]), **GREEDY)
    assert torch.equal(tokens, expected)


def test_layers_that_all_slide_take_one_mask(prompt, padding, graphs):
    model = build("mistral", [0, 2], sliding_window=6)
    expected, tokens = both(model, prompt, attention_mask=padding, **GREEDY)
    assert torch.equal(tokens, expected)


def test_a_model_without_recurrent_layers(prompt, padding, graphs):
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=3, head_dim=16)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, eos_token_id=None)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, pad_token_id=0)).double().eval()
    expected, tokens = both(model, prompt, attention_mask=padding, **GREEDY)
    assert torch.equal(tokens, expected)


def test_one_new_token_and_several_sequences_for_a_prompt(prompt):
    model = build("qwen3", LAYOUTS["mixed"])
    for kwargs in ({"max_new_tokens": 1}, {"max_new_tokens": 5, "num_return_sequences": 3, "do_sample": True}):
        torch.manual_seed(3)
        expected = model.generate(prompt, **kwargs)
        torch.manual_seed(3)
        assert torch.equal(model.generate_graphed(prompt, **kwargs), expected)


@pytest.mark.parametrize("mixer, parts", [({}, 4), ({"window": 6, "sinks": 2}, 10)], ids=["recurrence", "window"])
def test_states_keep_their_memory(mixer, parts, prompt):
    """Once they exist, and without gradient: a captured graph reads and writes the same addresses."""
    model = build("qwen3", LAYOUTS["mixed"], "x070", mixer=mixer)

    def addresses():
        parts = [part for slot in cache.layers if isinstance(slot, RecurrentLayer) for part in slot.state.tensors()]
        return [part.data_ptr() for part in parts]

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        before = addresses()
        model(prompt[:, :1], past_key_values=cache)
        model(prompt[:, :5], past_key_values=cache)
    assert addresses() == before and len(before) == parts
    model(prompt[:, :5], past_key_values=cache).logits.sum().backward()
    assert addresses() != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_state_from_an_inference_mode_is_replaced_outside_of_it(dtype, prompt):
    model = build("qwen3", LAYOUTS["mixed"], dtype=dtype)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(prompt, past_key_values=cache)
    with torch.no_grad():
        continued = model(prompt[:, :1], past_key_values=cache).logits
    expected = model(torch.cat([prompt, prompt[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(continued, expected)


def test_the_keys_of_the_prompt_are_released(prompt):
    model = build("qwen3", LAYOUTS["mixed"])
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    fixed = graphed_decoding.fixed_cache(cache, 64)
    assert cache.layers[1].keys is None and fixed.layers[1].keys.shape[2] == 64
    assert fixed.layers[0] is cache.layers[0]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"repetition_penalty": 1.1}, "RepetitionPenaltyLogitsProcessor"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"use_cache": False}, "use_cache=False"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"max_time": 1.0}, "MaxTimeCriteria"),
        ({"streamer": object()}, "does not stream"),
    ],
)
def test_refusals(kwargs, message, prompt):
    with pytest.raises(ValueError, match=message):
        build("qwen3", LAYOUTS["mixed"]).generate_graphed(prompt[:1], max_new_tokens=3, **kwargs)


def test_caches_that_do_not_fit_are_refused(prompt):
    model = build("qwen3", LAYOUTS["mixed"])
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate_graphed(prompt, max_new_tokens=3, past_key_values=DynamicCache(config=model.config))
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    with pytest.raises(ValueError, match="layer 0 keeps its keys and values in StaticLayer"):
        graphed_decoding.fixed_cache(StaticCache(config=model.config, max_cache_len=32), 64)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        graphed_decoding.mask_is_added(model, graphed_decoding.fixed_cache(cache, 64))
