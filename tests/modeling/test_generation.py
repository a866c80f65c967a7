"""Stock `generate()` on hybrid models: every way of reaching a token must reach the same token.

With and without cache, in chunks, left-padded, in beams. Models are tiny and random, in float64 so that an argmax
cannot flip by rounding. tests/families has the checks that every family has to pass.
"""

import threading

import pytest
import torch
from generation_cases import HEAD_SIZE, HEADS, KV_HEADS, LAYERS, LAYOUTS, NEW, VOCAB, build, check_paths, greedy
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    TextIteratorStreamer,
)

from rwkvinside.modeling.first_layer import ForwardContext
from rwkvinside.modeling.hybrid_base import FP32_PARAMETERS


@pytest.fixture(scope="module", params=list(LAYOUTS))
def model(request):
    return build("qwen3", LAYOUTS[request.param])


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(2, VOCAB, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "layout, preset",
    [
        ("all-rwkv", "hxa07b"),
        ("all-rwkv", "x070"),
        ("attention-first", "x070"),
        ("attention-first", "cxa076r"),
        ("mixed", "rad"),
    ],
)
def test_presets(preset, layout, prompt):
    check_paths(build("qwen3", LAYOUTS[layout], preset), prompt)


def test_attention_without_rotation(prompt):
    model = build("llama", [0, 2], attention_rope=False)
    check_paths(model, prompt)
    rotated = build("llama", [0, 2], attention_rope=True)
    rotated.load_state_dict(model.state_dict())
    assert not torch.allclose(model(prompt).logits, rotated(prompt).logits, atol=1e-3)

    # without rotation, attention does not see absolute positions, and the mixer of this preset has no positions at all
    positionless = build("llama", [0, 2], preset="cxa076r", attention_rope=False)
    positions = torch.arange(prompt.shape[1])[None]
    shifted = positionless(prompt, position_ids=positions + 100).logits
    torch.testing.assert_close(shifted, positionless(prompt, position_ids=positions).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "family, layout, preset, window, sinks",
    [
        ("qwen3", "all-rwkv", "cxa079", 4, 1),
        ("llama", "mixed", "x070", 1, 0),
        ("qwen2", "attention-first", "rad", 6, 4),
        ("qwen3", "all-rwkv", "cxa076r", 40, 4),  # more than there are tokens
    ],
)
def test_windows(family, layout, preset, window, sinks, prompt):
    model = build(family, LAYOUTS[layout], preset, mixer={"window": window, "sinks": sinks})
    check_paths(model, prompt)
    kwargs = {"max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    assert torch.equal(model.generate(prompt, **kwargs), model.generate(prompt, use_cache=False, **kwargs))
    without = build(family, LAYOUTS[layout], preset)
    without.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(model(prompt).logits, without(prompt).logits, atol=1e-3)


def test_a_window_keeps_its_size():
    model = build("llama", [0, 1, 2, 3], dtype=torch.bfloat16, mixer={"window": 32, "sinks": 4})
    sizes = {}
    with torch.no_grad():
        for length in (1024, 16384):
            cache = DynamicCache(config=model.config)
            for part in torch.full((1, length), 5).split(4096, 1):
                model.model(part, past_key_values=cache)
            model.model(torch.tensor([[7]]), past_key_values=cache)
            states = [slot.state for slot in cache.layers]
            sizes[length] = sum(x.untyped_storage().nbytes() for state in states for x in state.tensors())
            assert all(state.window.seen.tolist() == [length + 1] for state in states)
            assert {state.window.k.dtype for state in states} == {torch.bfloat16}
    recurrence, window = 4 * HEADS * HEAD_SIZE**2, 2 * 2 * KV_HEADS * 36 * HEAD_SIZE + 8
    assert sizes == dict.fromkeys(sizes, LAYERS * (recurrence + window))


@pytest.mark.parametrize(
    "family, layout, window, sinks, rotates",
    [("qwen3", "mixed", 5, 2, True), ("llama", "attention-first", 1, 0, False), ("phi3", "mixed", 40, 4, True)],
)
def test_kept_layers_that_are_cut(family, layout, window, sinks, rotates, prompt):
    fields = {"attention_window": window, "attention_sinks": sinks, "attention_rope": rotates}
    model = build(family, LAYOUTS[layout], **fields)
    check_paths(model, prompt)
    kwargs = {"max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    assert torch.equal(model.generate(prompt, **kwargs), model.generate(prompt, use_cache=False, **kwargs))
    graphed = model.generate_graphed(prompt, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    assert torch.equal(graphed, greedy(model, prompt))
    whole = build(family, LAYOUTS[layout], attention_rope=rotates)
    whole.load_state_dict(model.state_dict())
    assert torch.allclose(model(prompt).logits, whole(prompt).logits, atol=1e-10) == (window > prompt.shape[1])


def test_what_a_cut_layer_sees():
    """A changed token reaches what the layer gives where it is in the window or among the first, nowhere else."""
    model = build("llama", [2], attention_window=5, attention_sinks=2)
    attention, still = model.model.layers[0].self_attn, torch.ones(1, 30, HEAD_SIZE, dtype=torch.float64)
    x = torch.randn(1, 30, model.config.hidden_size, dtype=torch.float64)
    given = {"position_embeddings": (still, 0 * still), "forward_context": ForwardContext()}
    before = attention(x, **given)[0]
    for changed in (0, 1, 2, 11):
        other = x.clone()
        other[:, changed] += 1
        differs = (attention(other, **given)[0] - before).abs().amax((0, 2)) > 1e-9
        seen = [t for t in range(30) if changed <= t and (t < changed + 5 or changed < 2)]
        assert differs.nonzero().flatten().tolist() == seen


def test_a_model_made_from_scratch_keeps_its_size():
    model = build("llama", [0, 2], dtype=torch.bfloat16, attention_window=32, attention_sinks=4)
    sizes = {}
    with torch.no_grad():
        for length in (1024, 16384):
            cache = DynamicCache(config=model.config)
            for part in torch.full((1, length), 5).split(4096, 1):
                model.model(part, past_key_values=cache)
            model.model(torch.tensor([[7]]), past_key_values=cache)
            states = [slot.state for slot in cache.layers]
            sizes[length] = sum(x.untyped_storage().nbytes() for state in states for x in state.tensors())
            assert cache.get_seq_length() == length + 1
    recurrence, ring = 4 * HEADS * HEAD_SIZE**2, 2 * 2 * KV_HEADS * 36 * HEAD_SIZE + 8
    assert sizes == dict.fromkeys(sizes, 2 * (recurrence + ring))


def test_what_cannot_be_cut_is_refused(prompt):
    with pytest.raises(ValueError, match="attention_window 0 and attention_sinks 2: neither is negative, sinks need"):
        build("llama", [0, 2], attention_sinks=2)
    with pytest.raises(ValueError, match="attention_log_base is 1: a logarithm needs more than 1"):
        build("llama", [0, 2], attention_log_base=1)
    model = build("llama", [0, 2], attention_window=4, attention_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"attention_dropout 0.1 is not computed in a window"):
        model(prompt)


@pytest.mark.parametrize("layout", ["mixed", "attention-first"])
def test_kept_layers_with_a_sliding_window(layout, prompt):
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    window = {"use_sliding_window": True, "sliding_window": 6, "layer_types": kinds}
    check_paths(build("qwen2", LAYOUTS[layout], **window), prompt)


@pytest.mark.parametrize("attention", [{}, {"attention_rope": False, "attention_log_base": 8.0}])
def test_left_padded_rows_need_no_positions(attention, prompt):
    model = build("llama", [0, 2] if attention else [0, 1, 2], **attention)
    short = prompt[:1, 5:]
    padded = torch.cat([prompt[:1], torch.nn.functional.pad(short, (5, 0))])
    mask = torch.ones_like(padded)
    mask[1, :5] = 0
    whole = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(whole[0], model(prompt[:1]).logits[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(whole[1, 5:], model(short).logits[0], rtol=0, atol=1e-12)

    cache = DynamicCache(config=model.config)
    model(padded[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
    rest = model(padded[:, 9:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 9:], rtol=0, atol=1e-12)


def test_right_padding_leaves_the_state_alone(prompt):
    model = build("qwen3", LAYOUTS["all-rwkv"], preset="x070")
    mask = torch.ones_like(prompt)
    mask[:, -4:] = 0
    padded, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(prompt, attention_mask=mask, past_key_values=padded)
    model(prompt[:, :-4], past_key_values=plain)
    for a, b in zip(padded.layers, plain.layers, strict=True):
        for x, y in zip(a.state, b.state, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_beams_with_and_without_cache(model, prompt):
    kwargs = {"max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    cached = model.generate(prompt, **kwargs)
    assert cached.shape[0] == 4
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **kwargs))
    assert not torch.equal(cached[0], cached[1])


def test_sampling_returns_different_reproducible_sequences(model, prompt):
    kwargs = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3, "top_k": 50}
    torch.manual_seed(7)
    cached = model.generate(prompt, **kwargs)
    torch.manual_seed(7)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **kwargs))
    assert not torch.equal(cached[0], cached[1])


def test_streaming_gives_the_generated_tokens(model, prompt):
    class Spelling:
        """The part of a tokenizer a streamer uses: one word per token."""

        def decode(self, ids, **kwargs):
            return "".join(f"{i} " for i in torch.as_tensor(ids).tolist())

    streamer = TextIteratorStreamer(Spelling(), skip_prompt=True, timeout=60)
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "streamer": streamer}
    worker = threading.Thread(target=model.generate, args=(prompt[:1],), kwargs=kwargs)
    worker.start()
    text = "".join(streamer)
    worker.join()
    assert [int(word) for word in text.split()] == greedy(model, prompt[:1])[0].tolist()


def test_generate_makes_the_default_cache(model, prompt):
    assert model._supports_default_dynamic_cache()
    out = model.generate(prompt, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, DynamicCache)
    assert out.past_key_values.get_seq_length() == prompt.shape[1] + 2


@pytest.mark.parametrize("mixer", [{}, {"window": 5, "sinks": 2}], ids=["recurrence", "window"])
def test_cache_rows_can_be_repeated_and_selected(mixer, prompt):
    model = build("llama", LAYOUTS["mixed"], preset="x070", mixer=mixer)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    token = torch.tensor([[5], [5]])
    swapped = model(token, past_key_values=cache).logits
    expected = model(torch.cat([prompt.flip(0), token], 1)).logits[:, -1:]
    torch.testing.assert_close(swapped, expected, rtol=0, atol=1e-10)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(prompt, past_key_values=cache).logits, model(prompt).logits, rtol=0, atol=1e-12)


def test_refusals(prompt):
    model = build("llama", LAYOUTS["mixed"])
    with pytest.raises(ValueError, match="2-D padding mask"):
        model(prompt, attention_mask=torch.ones(2, 1, 21, 21, dtype=torch.bool))
    with pytest.raises(TypeError, match="StaticCache cannot hold a recurrent state"):
        model(prompt, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises((TypeError, ValueError), match="StaticCache cannot|static caches"):
        model.generate(prompt, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(prompt[:1], max_new_tokens=2, prompt_lookup_num_tokens=2)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-1)


def test_speculation_is_refused_before_a_token_is_read(prompt):
    """Neither as target nor as assistant: in the middle, the cache of the assistant could not be cropped."""
    hybrid, calls = build("llama", LAYOUTS["mixed"]), []
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, eos_token_id=None)).double().eval()
    for model in (hybrid, teacher):
        model.register_forward_pre_hook(lambda module, args: calls.append(module))
    for target, assistant, role in ((hybrid, teacher, "generate with an"), (teacher, hybrid, "be the")):
        with pytest.raises(ValueError, match=f"HybridLlamaForCausalLM cannot {role} assistant_model.*rolled back"):
            target.generate(prompt[:1], max_new_tokens=4, assistant_model=assistant)
    with pytest.raises(ValueError, match="cannot generate with an assistant_model"):
        hybrid.generate_graphed(prompt[:1], max_new_tokens=4, assistant_model=teacher)
    assert calls == []
    assert teacher.generate(prompt[:1], max_new_tokens=4, assistant_model=teacher).shape == (1, prompt.shape[1] + 4)
    assert calls, "the test would see a token that was read"


def test_gradients_with_checkpointing_equal_those_without(prompt):
    model = build("qwen3", LAYOUTS["attention-first"]).train()

    def gradients():
        model.zero_grad()
        model(prompt, labels=prompt, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    assert plain["model.layers.1.self_attn.value.weight"].abs().sum() > 0
    model.activation_checkpointing_enable()
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, plain[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("enable", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_reentrant_checkpointing_is_refused(enable):
    """It would train, with a gradient that lacks what comes through v_first."""
    model = build("qwen3", LAYOUTS["attention-first"])
    for part in (model, model.model):
        with pytest.raises(ValueError, match=r'v_first.*gradient_checkpointing_kwargs=\{"use_reentrant": False\}'):
            getattr(part, enable)({"use_reentrant": True})
        assert not part.is_activation_checkpointing
    getattr(model, enable)({"preserve_rng_state": False})  # not reentrant unless it says so
    assert model.is_activation_checkpointing
    layer = model.model.layers[0]
    assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is False


@pytest.mark.parametrize(
    "preset, mixer", [("cxa079", {}), ("x070", {}), ("cxa079", {"window": 8, "sinks": 1, "window_mix": "softmax"})]
)
def test_parameters_that_bf16_is_too_coarse_for_stay_fp32(tmp_path, prompt, preset, mixer):
    model = build("qwen3", LAYOUTS["mixed"], preset, dtype=torch.float32, mixer=mixer)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    kept = {name for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    names = {pattern.split(".")[-1].rstrip("$") for pattern in FP32_PARAMETERS}
    expected = {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] in names}
    assert kept == expected and len(kept) > 4
    for name in kept:
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    loaded.generation_config = GenerationConfig(pad_token_id=0)
    assert loaded.generate(prompt, max_new_tokens=3).shape == (2, 24)
    # weights of 8 bits: logits of magnitude 10 agree to a few tenths
    error = (loaded(prompt).logits.float() - model(prompt).logits).abs().mean()
    assert error < 0.05 * model(prompt).logits.abs().mean() + 0.1


def test_a_partly_loaded_mixer_is_an_error(tmp_path):
    model = build("llama", LAYOUTS["mixed"], dtype=torch.float32)
    state = model.state_dict()
    del state["model.layers.2.self_attn.w0"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="layer 2 are missing: w0"):
        type(model).from_pretrained(tmp_path)
