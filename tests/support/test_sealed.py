"""JSON with a seal: what was written comes back, anything else is refused."""

import json

import pytest

from rwkvinside.support.sealed import sealed, unsealed

VALUES = {"b": [1, 2.5, None], "a": {"x": "é", "y": True}}


def test_what_was_written_comes_back():
    text = sealed(VALUES)
    assert unsealed(text) == VALUES and list(unsealed(text)) == ["b", "a"]
    assert list(json.loads(text))[-1] == "seal"
    assert unsealed(json.dumps(json.loads(text))) == VALUES, "how it is laid out does not matter"


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", json.dumps(VALUES), "[" * 100_000, sealed(VALUES)[:-3]])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError):
        unsealed(text)


def test_every_bit_counts():
    """A flipped bit is refused, or changed nothing but the layout."""
    content = sealed(VALUES).encode()
    refused = 0
    for i in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[i // 8] ^= 1 << i % 8
        try:
            assert unsealed(damaged.decode()) == VALUES
        except ValueError:
            refused += 1
    assert refused > 0.9 * 8 * len(content)
