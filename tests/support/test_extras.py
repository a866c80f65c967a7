"""Libraries that are asked for where they are needed."""

import sys

import pytest

from rwkvinside.errors import UserError
from rwkvinside.support.extras import import_extra


def test_a_library_that_is_there_is_returned():
    assert import_extra("json", "this") is sys.modules["json"]


def test_one_that_is_not_is_named_with_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="quantized layers needs no_such_library, which is not installed") as error:
        import_extra("no_such_library", "quantized layers", "or leave it")
    assert error.value.hint == "pip install no_such_library; or leave it"
    (tmp_path / "broken_library.py").write_text("import another_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="cannot be imported: No module named 'another_that_is_missing'"):
        import_extra("broken_library", "this")
