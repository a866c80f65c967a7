"""JSON with a seal: what was written comes back, anything else is refused."""

import json

import pytest

from rwkvinside.support.sealed import read_sealed, sealed, sealed_text, unsealed

VALUES = {"b": [1, 2.5, None], "a": {"x": "é", "y": True}}


def test_what_was_written_comes_back():
    text = sealed_text(VALUES)
    assert unsealed(text) == VALUES and list(unsealed(text)) == ["b", "a"]
    assert list(json.loads(text))[-1] == "seal"
    assert unsealed(json.dumps(json.loads(text))) == VALUES, "how it is laid out does not matter"


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", json.dumps(VALUES), "[" * 100_000, sealed_text(VALUES)[:-3]])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError):
        unsealed(text)


def test_every_bit_counts():
    """A flipped bit is refused, or changed nothing but the layout."""
    content = sealed_text(VALUES).encode()
    refused = 0
    for i in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[i // 8] ^= 1 << i % 8
        try:
            assert unsealed(damaged.decode()) == VALUES
        except ValueError:
            refused += 1
    assert refused > 0.9 * 8 * len(content)


def test_what_was_sealed_is_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(sealed({"b": [1, None], "a": "ü"})))
    content, digest = read_sealed(file)
    assert content == {"a": "ü", "b": [1, None]} and len(digest) == 64
    file.write_text(json.dumps(sealed({"a": "ü", "b": [1, None]}), indent=3))
    assert read_sealed(file) == (content, digest)  # neither order nor layout count


@pytest.mark.parametrize(
    "text, said",
    [
        (json.dumps(sealed({"a": 1})).replace('"a": 1', '"a": 2'), "a.json was changed after it was written"),
        (json.dumps(sealed({"a": 1}))[:-3], "a.json cannot be read"),
        ('{"a": 1}', "a.json cannot be read"),
        ("[]", "a.json cannot be read"),
        (None, "a.json cannot be read"),
    ],
)
def test_what_is_not_as_it_was_sealed(tmp_path, text, said):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_sealed(tmp_path / "a.json")
