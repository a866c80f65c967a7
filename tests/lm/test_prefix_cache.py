"""A prompt is read from the longest beginning on whose state was kept."""

import pytest
import torch
from generation_cases import VOCAB, build

from rwkvinside.lm.prefix_cache import PrefixCache
from rwkvinside.lm.session import StatefulModel


@pytest.fixture(scope="module")
def model():
    return StatefulModel(build(), chunk_size=5)


def tokens(length=30):
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(2))


def test_a_known_beginning_is_not_read_again(model):
    cache, ids = PrefixCache(model), tokens()
    for length in (4, 12, 30):
        _, state, reused = cache.read(ids[:, :length])
        cache.keep(ids[:, :length], state)
        assert reused == {4: 0, 12: 4, 30: 12}[length]
    other = torch.cat([ids[:, :20], ids[:, :7]], 1)
    logits, _, reused = cache.read(other)
    assert reused == 12  # 30 are more than it has in common
    torch.testing.assert_close(logits, model(other).logits[:, -1])
    again, _, reused = cache.read(ids)  # its last token has to be read for its logits
    assert reused == 12
    torch.testing.assert_close(again, model(ids).logits[:, -1])


def test_the_least_recently_used_goes_first(model):
    cache, ids = PrefixCache(model, "int8", most=2), tokens()
    for length in (5, 10):
        cache.keep(ids[:, :length], cache.read(ids[:, :length])[1])
    assert cache.read(ids[:, :7])[2] == 5
    small = cache.nbytes
    cache.keep(ids[:, :15], cache.read(ids[:, :15])[1])  # which read from 10 on, so 5 goes
    assert cache.read(ids[:, :8])[2] == 0 and cache.read(ids[:, :12])[2] == 10 and cache.read(ids)[2] == 15
    exact = PrefixCache(model)
    for length in (5, 10):
        exact.keep(ids[:, :length], exact.read(ids[:, :length])[1])
    assert 0 < small < 0.4 * exact.nbytes
