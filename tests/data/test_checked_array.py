"""Checksums of blocks, whatever pieces a file is written in, and arrays that are checked by them."""

import zlib

import numpy as np
import pytest

from rwkvinside.data import checked_array
from rwkvinside.data.checked_array import CheckedArray, Checksums
from rwkvinside.errors import UserError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(checked_array, "BLOCK", 64)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize("pieces", [1, 7, 64, 1000])
def test_checksums_do_not_depend_on_the_pieces(size, pieces):
    content = np.random.default_rng(0).bytes(size)
    checksums = Checksums()
    for start in range(0, size, pieces):
        checksums.update(content[start : start + pieces])
    assert checksums.finish() == [zlib.crc32(content[i : i + 64]) for i in range(0, size, 64)]


@pytest.fixture
def array(tmp_path):
    values = np.arange(100, dtype=np.uint32)  # 400 bytes: six blocks and a short one
    (tmp_path / "values").write_bytes(values.tobytes())
    checksums = Checksums()
    checksums.update(values.tobytes())
    return lambda: CheckedArray(tmp_path / "values", np.uint32, checksums.finish(), "copy it again")


def test_slices_are_those_of_the_array(array):
    values, checked = np.arange(100), array()
    for piece in (slice(0, 0), slice(3, 5), slice(15, 17), slice(0, 100), slice(90, None), slice(99, 200)):
        assert np.array_equal(checked[piece], values[piece])
    assert len(checked) == 100 and np.array_equal(checked, values)
    assert np.asarray(checked, dtype=np.int64).dtype == np.int64


def test_only_blocks_in_use_are_read_and_only_once(array, monkeypatch):
    seen = []
    real = zlib.crc32
    monkeypatch.setattr(checked_array.zlib, "crc32", lambda block: seen.append(len(block)) or real(block))
    checked = array()
    seen.clear()
    assert checked[3:5].sum() == 7 and seen == [64]
    checked[0:16], checked[5:6]
    assert seen == [64]
    checked[15:17], checked[95:100]
    assert seen == [64, 64, 64, 16]


@pytest.mark.parametrize("position", [0, 70, 399])
def test_damage_is_named_at_first_use(array, tmp_path, position):
    content = bytearray((tmp_path / "values").read_bytes())
    content[position] ^= 1
    (tmp_path / "values").write_bytes(content)
    checked, block = array(), position // 64
    with pytest.raises(UserError, match=f"values is damaged between its bytes {64 * block} and") as caught:
        checked[position // 4 : position // 4 + 1]
    assert caught.value.hint == "copy it again"
    assert len(checked[17:20] if block != 1 else checked[0:16])


def test_a_missing_file(array, tmp_path):
    (tmp_path / "values").unlink()
    with pytest.raises(UserError, match="values cannot be read"):
        array()
