"""The score of what lies beyond a window: the shares that it is fitted to, and that the fit finds what is there."""

import math

import torch

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


def shares_of(c, given):
    """The attention beyond the window by head, for tokens that have some, one token and one head at a time."""
    q, k, _, segments, _ = given
    shares = []
    for b in range(B):
        for t in range(T):
            document = [j for j in range(t + 1) if segments[b, j] == segments[b, t] != 0]
            near = {j for i, j in enumerate(document) if t - j < c.window or i < c.sinks}
            if len(near) < len(document):
                scores = torch.stack([k[b, document, h // (H // G)] @ q[b, t, h] for h in range(H)]) * N**-0.5
                weights = scores.softmax(-1)
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
