import pytest

from rwkvinside.support.names import is_name


@pytest.mark.parametrize("name", ["align", "align_lora", "a-b.2", "2", "-", "model-00001-of-00002.safetensors"])
def test_names(name):
    assert is_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "/a", "a\\b", "a b", "a\n", "ä", "x" * 101, None, 3])
def test_what_is_no_name(name):
    assert not is_name(name)
