"""Which share of its calibration a windowed student keeps: of a sum, never one that is worse than its control."""

import math
from dataclasses import replace

import pytest
import torch
from hybrid_cases import logits, packed, teacher

from rwkvinside.data.batch import Batch
from rwkvinside.hybrid.calibration import Calibrated, calibrate
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.stages.calibrate import Calibrate
from rwkvinside.stages.shares import SHARES, choose_shares, most_trials, split_rows
from rwkvinside.support.progress import Progress


def kl(model, batches, mode="student"):
    """Of all tokens with a label, by hand."""
    total = 0.0
    for batch in batches:
        real = batch.labels != -100
        p, q = (logits(model, batch, which)[real].double().log_softmax(-1) for which in ("teacher", mode))
        total += float((p.exp() * (p - q)).sum())
    return total


def calibrated(**fields):
    fields = {"window": 4, "sinks": 1, "window_mix": "sum"} | fields
    model = HybridModel.from_teacher(teacher("llama", layers=5), StudentConfig(**fields))
    before = {i: mixer.output.weight.detach().clone() for i, mixer in model.mixers.items()}
    calibrate(model, [packed([40, 24], rows=3)])
    return model, {i: Calibrated.of(mixer, before[i]) for i, mixer in model.mixers.items() if mixer.mixer_config.window}


def test_no_share_is_the_control_and_all_of_it_the_fit():
    model, layers = calibrated()
    batch = packed([30, 9], seed=8)
    fitted = logits(model, batch, "student")
    for layer in layers.values():
        layer.keep(0.0)
    torch.testing.assert_close(logits(model, batch, "student"), logits(model, batch, "control"), rtol=0, atol=2e-5)
    for layer in layers.values():
        layer.keep(1.0)
    torch.testing.assert_close(logits(model, batch, "student"), fitted, rtol=0, atol=1e-5)


def test_no_share_of_a_softmax_leaves_a_tenth_of_the_odds_to_learn_from():
    model, layers = calibrated(window_mix="softmax")
    batch = packed([30, 9], seed=8)
    fitted, before = logits(model, batch, "student"), {i: model.mixers[i].far_bias.clone() for i in layers}
    for i, layer in layers.items():
        layer.keep(0.0)
        torch.testing.assert_close(model.mixers[i].far_bias, before[i] + math.log(0.1))
        assert (model.mixers[i].mix_window == 1).all() and torch.equal(model.mixers[i].output.weight, layer.projection)
    control, teacher_logits = (logits(model, batch, mode) for mode in ("control", "teacher"))
    rest = logits(model, batch, "student") - control
    assert 0 < rest.norm() < 0.3 * (control - teacher_logits).norm()
    for layer in layers.values():
        layer.keep(1.0)
    torch.testing.assert_close(logits(model, batch, "student"), fitted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window_mix", ["sum", "softmax"])
def test_the_best_of_what_was_tried_is_kept(window_mix):
    model, layers = calibrated(window_mix=window_mix)
    held = [packed([25, 30], rows=2, seed=9)]
    alike = []
    for share in SHARES:
        for layer in layers.values():
            layer.keep(share)
        alike.append(kl(model, held))
    told = []
    shares = choose_shares(model, layers, held, lambda: told.append(1))
    assert len(SHARES) < len(told) <= most_trials(len(layers))
    assert shares.keys() == layers.keys() and set(shares.values()) <= set(SHARES)
    assert kl(model, held) <= min(alike) * (1 + 1e-5)
    if window_mix == "sum":
        assert kl(model, held) <= kl(model, held, "control") * (1 + 1e-5)


def test_a_fit_that_harms_is_given_up():
    model, layers = calibrated()
    with torch.no_grad():
        for layer in layers.values():
            layer.fitted[2].normal_()
    held = [packed([25, 30], seed=9)]
    assert set(choose_shares(model, layers, held).values()) == {0.0}
    assert kl(model, held) == pytest.approx(kl(model, held, "control"), rel=1e-4)


@pytest.mark.parametrize("window_mix", ["sum", "softmax"])
def test_layers_without_a_window_are_left_alone(window_mix):
    model, layers = calibrated(window={"1-2": 4}, attention_layers=(3,), window_mix=window_mix)
    assert sorted(layers) == [1, 2]
    before = model.mixers[0].output.weight.clone()
    assert choose_shares(model, layers, [packed([25], seed=9)]).keys() == {1, 2}
    assert torch.equal(model.mixers[0].output.weight, before)


def rows(*counts, width=8):
    batches, first = [], 0
    for count in counts:
        ids = torch.arange(first, first + count)[:, None].expand(-1, width).contiguous()
        batches.append(Batch(ids, ids, ids, torch.ones_like(ids).int(), tuple(range(first, first + count))))
        first += count
    return batches


@pytest.mark.parametrize("counts, held", [((7,), 1), ((2, 2), 1), ((3, 3, 3), 2), ((1, 1), 1), ((40, 2), 10)])
def test_the_last_rows_are_held_out(counts, held):
    fitted, rest = split_rows(rows(*counts))
    for part, wanted in ((fitted, range(sum(counts) - held)), (rest, range(sum(counts) - held, sum(counts)))):
        assert [row for batch in part for row in batch.rows] == list(wanted)
        assert torch.cat([batch.input_ids[:, 0] for batch in part]).tolist() == list(wanted)
        assert sum(batch.num_tokens for batch in part) == 8 * len(wanted)


def test_few_rows_of_many_tokens_are_enough_and_one_row_is_both():
    assert [len(batch.rows) for batch in split_rows(rows(20, width=2048))[1]] == [2]
    (one,) = rows(1)
    assert split_rows([one]) == ([one], [one])


@pytest.mark.parametrize("counts", [(3,), (2, 1), (1, 2), (2,)])
@pytest.mark.parametrize("real", [1, 3, 4, 8])
def test_a_last_row_of_padding_is_left_out(counts, real):
    batches = rows(*counts)
    batches[-1].segment_ids[-1, real:] = 0
    batches[-1] = replace(batches[-1])  # counts its tokens
    fitted, held = split_rows(batches)
    read = sorted({row for part in (fitted, held) for batch in part for row in batch.rows})
    assert read == list(range(sum(counts) - (real < 4)))
    assert all(batch.num_tokens for batch in held)
    (one,) = batches[-1:]
    alone = replace(one, **{f: getattr(one, f)[-1:] for f in ("input_ids", "labels", "position_ids", "segment_ids")})
    alone = replace(alone, rows=(0,))
    assert split_rows([alone]) == ([alone], [alone])


@pytest.mark.parametrize("lengths, joined", [((60, 4), False), ((16, 16, 16, 16), False), ((15, 17, 16, 10, 6), True)])
def test_short_documents_are_read_as_one_where_mixers_have_windows(lengths, joined, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "rwkvinside.hybrid.calibration.calibrate", lambda model, batches, progress: seen.extend(batches)
    )
    for window in (0, 4):
        model = HybridModel.from_teacher(teacher("llama"), StudentConfig(window=window))
        with pytest.raises(AttributeError):  # nothing was fitted
            Calibrate().fit(model, [packed(lengths, rows=3)], Progress("fit"))
    plain, windowed = (max(int(batch.segment_ids.max()) for batch in part) for part in (seen[:1], seen[1:]))
    assert plain == len(lengths) and windowed == (1 if joined else len(lengths))
