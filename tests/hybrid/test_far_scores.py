"""The score of what lies beyond a window: the shares that it is fitted to, and that the fit finds what is there."""

import math

import pytest
import torch

from rwkvinside.hybrid import far_scores
from rwkvinside.hybrid.far_scores import Attention, fit_far_scores
from rwkvinside.modeling.mixer_presets import TimeMixerConfig

B, T, H, G, N = 2, 60, 4, 2, 8


def config(**fields):
    sizes = dict(hidden_size=H * N, num_heads=H, num_kv_heads=G, head_size=N, window=4, sinks=2, window_mix="softmax")
    return TimeMixerConfig(**sizes | fields)


def attention(scale=1.0, lengths=(50, 10)):
    """Packed documents and no padding."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(B, T, heads, N, generator=generator, dtype=torch.float64) for heads in (H, G, G))
    segments = torch.cat([torch.full((length,), i + 1) for i, length in enumerate(lengths)])
    return Attention(scale * q, k, v, segments.expand(B, T), torch.ones(B, T, dtype=torch.float64))


def shares_of(c, given, own=T):
    """The attention beyond the window by head, for tokens that have some, one token and one head at a time."""
    q, k, _, segments, _ = given
    shares = []
    for b in range(B):
        for t in range(T):
            document = [j for j in range(t + 1) if segments[b, j] == segments[b, t] != 0]
            near = {j for i, j in enumerate(document) if t - j < c.window or i < c.sinks}
            if len(near) < len(document):
                scores = torch.stack([k[b, document, h // (H // G)] @ q[b, t, h] for h in range(H)]) * N**-0.5
                seen = torch.tensor([t - j < own for j in document])
                weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
                shares.append(weights[:, [i for i, j in enumerate(document) if j not in near]].sum(-1))
    return torch.stack(shares, 1)


def test_the_shares_are_those_of_the_whole_softmax():
    c, given = config(), attention()
    fit = fit_far_scores(c, [given])
    torch.testing.assert_close(fit.share, shares_of(c, given).mean(1))


def test_where_all_keys_are_alike_only_their_number_counts():
    c, given = config(), attention(scale=0.0)
    fit = fit_far_scores(c, [given])
    assert fit.key.abs().max() == 0
    for value, wanted in ((fit.bias, 0.0), (fit.growth, 1.0)):
        torch.testing.assert_close(value, torch.full_like(value, wanted), rtol=0, atol=1e-6)


def test_a_score_that_the_query_decides_is_found():
    """What lies beyond has one key, and weighs as the query is alike to it."""
    c, given = config(sinks=0), attention(scale=2.0, lengths=(60,))
    key = torch.randn(G, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    given = given._replace(k=torch.where(torch.arange(T)[:, None, None] < T - 4, key, given.k))
    given = given._replace(segment_ids=given.segment_ids.clone())
    given.segment_ids[:, : T - 20] = 0  # all else has left the window, or is still in it
    fit = fit_far_scores(c, [given])
    error = (shares_of(c, given) - _predicted(c, given, fit)).abs().max()
    assert error < 0.02, error
    assert torch.nn.functional.cosine_similarity(fit.key, key.repeat_interleave(H // G, 0)).min() > 0.9


def _predicted(c, given, fit):
    shares = []
    for b in range(B):
        for t in range(T):
            document = [j for j in range(t + 1) if given.segment_ids[b, j] == given.segment_ids[b, t] != 0]
            near = [j for i, j in enumerate(document) if t - j < c.window or i < c.sinks]
            if far := len(document) - len(near):
                scores = torch.stack([given.k[b, near, h // (H // G)] @ given.q[b, t, h] for h in range(H)]) * N**-0.5
                beyond = (given.q[b, t] * fit.key).sum(-1) + fit.bias + fit.growth * math.log(far)
                shares.append(torch.sigmoid(beyond - scores.logsumexp(-1)))
    return torch.stack(shares, 1)


def test_nothing_lies_beyond_a_window_over_everything():
    assert fit_far_scores(config(window=60), [attention()]) is None


def test_what_the_teacher_does_not_see_has_no_share():
    """Of a teacher with a window of its own, which may leave nothing beyond the student's."""
    c, given = config(), attention()
    fit = fit_far_scores(c, [given], own=20)
    torch.testing.assert_close(fit.share, shares_of(c, given, own=20).mean(1))
    assert (_predicted(c, given, fit).mean(1) - fit.share).abs().max() < 0.1
    fit = fit_far_scores(config(sinks=0), [given], own=4)
    assert fit.share.max() < 1e-6 and _predicted(config(sinks=0), given, fit).max() < 1e-4


@pytest.mark.parametrize("queries", [1, 7, 64])
def test_blocks_of_queries_change_nothing(queries, monkeypatch):
    c, given = config(), attention(scale=2.0)
    whole = fit_far_scores(c, [given])
    monkeypatch.setattr(far_scores, "QUERIES", queries)
    for blocked, wanted in zip(fit_far_scores(c, [given]), whole, strict=True):
        torch.testing.assert_close(blocked, wanted)


def test_a_head_without_values_leaves_the_others_what_they_are():
    """Its queries are as large as those of any head; in fp32, as in calibration."""
    c, given = config(), Attention(*(x.float() if x.is_floating_point() else x for x in attention(scale=3.0)))
    wanted = fit_far_scores(c, [given])
    v = given.v.clone()
    v[:, :, 0] = 0  # of heads 0 and 1
    found = fit_far_scores(c, [given._replace(v=v)])
    assert all(x.isfinite().all() for x in found)
    error = (_predicted(c, given, found) - shares_of(c, given)).square().mean(1)
    best = (_predicted(c, given, wanted) - shares_of(c, given)).square().mean(1)
    torch.testing.assert_close(error[2:], best[2:], rtol=0.2, atol=1e-4)
    assert error[:2].max() < 0.2  # fitted to the teacher's share all the same
