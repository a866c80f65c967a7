import json

import pytest

from rwkvinside.support.sealed import read_sealed, sealed


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
