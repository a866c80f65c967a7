"""Controls of a student: without its recurrence, and the teacher cut to its windows with its own logits."""

import torch
from transformers import AutoModelForCausalLM, GraniteConfig

from rwkvinside.evaluate.controls import CutTeacher, without_recurrence
from rwkvinside.hybrid.document_attention import Window
from rwkvinside.modeling.mixer_presets import TimeMixerConfig
from rwkvinside.modeling.time_mixer import TimeMixer


def test_without_its_recurrence_a_mixer_knows_only_its_own_token():
    config = TimeMixerConfig.from_preset(
        "cxa079", hidden_size=16, num_heads=2, num_kv_heads=1, head_size=8, qk_norm=False, rope=False
    )
    mixer = TimeMixer(config, True)
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[:, 0] += 1
    assert not torch.equal(mixer(x, first=None)[0][:, 1:], mixer(changed, first=None)[0][:, 1:])
    with without_recurrence(mixer) as count:
        assert count == 1
        assert torch.equal(mixer(x, first=None)[0][:, 1:], mixer(changed, first=None)[0][:, 1:])
    assert not torch.equal(mixer(x, first=None)[0][:, 1:], mixer(changed, first=None)[0][:, 1:])
    assert not vars(mixer).keys() & {"recur", "beyond"}


def test_without_its_recurrence_a_window_has_the_softmax_for_itself():
    config = TimeMixerConfig.from_preset(
        "cxa079", hidden_size=16, num_heads=2, num_kv_heads=1, head_size=8, qk_norm=False, rope=False, window=2
    )
    alone, mixer = (TimeMixer(config.replace(window_mix=mix), True) for mix in ("sum", "softmax"))
    mixer.load_state_dict(alone.state_dict(), strict=False)
    alone.mix_window.data.fill_(1)
    mixer.far_bias.data.fill_(1)
    x = torch.randn(1, 6, 16)
    with without_recurrence(alone), without_recurrence(mixer):
        mixer.mix_window.data.fill_(1)
        torch.testing.assert_close(mixer(x, first=None)[0], alone(x, first=None)[0])
    assert not torch.allclose(mixer(x, first=None)[0], alone(x, first=None)[0])


def test_the_cut_teacher_gives_the_logits_of_its_family():
    """Granite divides its head's output; windows that reach over the whole text leave the teacher as it is."""
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=8.0, initializer_range=0.5,
    )  # fmt: skip
    teacher = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 50, (2, 12))
    with torch.no_grad():
        expected = teacher(ids).logits
        cut = CutTeacher(teacher, {0: Window(12, 0), 1: Window(12, 0)})
        torch.testing.assert_close(cut.last_logits(ids, 4), expected[:, -4:], atol=1e-5, rtol=1e-5)
        near = CutTeacher(teacher, {0: Window(2, 0), 1: Window(2, 0)}).last_logits(ids, 4)
    assert not torch.allclose(near, expected[:, -4:], atol=1e-3)
    assert teacher.config._attn_implementation == "sdpa"
