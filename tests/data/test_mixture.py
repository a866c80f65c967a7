"""Mixtures: shares of the tokens at any point, every row in one place, sources that begin again."""

import numpy as np
import pytest

from rwkvinside.data.mixture import BLOCK, MixedRows
from rwkvinside.data.rows import PackedRows, WholeDocuments


def store_of(make_store, source, lengths):
    """Documents in which every id tells the source."""
    return make_store([[source] * n for n in lengths])


@pytest.fixture
def mixed(make_store):
    """30 %, 69 % and 1 % of: a source of a few rows, a large one, one that is shorter than a row."""
    lengths = ([7, 9, 100], np.random.default_rng(0).integers(1, 90, 400), [5])
    parts = [PackedRows(store_of(make_store, i, n), 16, seed=i) for i, n in enumerate(lengths)]
    return MixedRows(parts, [30, 69, 1], seed=11)


@pytest.mark.parametrize("rows", [50, 1000, 30_000, BLOCK + 12_345])
def test_shares_are_of_tokens_at_any_point(mixed, rows):
    tokens = np.array(mixed.tokens_of(rows))
    # 116 tokens in 8 rows of 16, 5 tokens in a row of 16: rows alone would give the last source a third of its share
    assert tokens / tokens.sum() == pytest.approx([0.3, 0.69, 0.01], abs=3 * 16 / tokens.sum() + 1e-4)
    if rows <= 1000:
        batch = mixed.batch(range(rows))
        real = batch.input_ids[batch.mask]
        assert [int((real == source).sum()) for source in range(3)] == tokens.tolist()


def test_every_row_of_a_source_comes_in_its_order(mixed):
    seen = [0, 0, 0]
    for i in range(2000):
        source, row = mixed.place(i)
        assert row == seen[source]
        seen[source] += 1
    assert seen == mixed.counts(2000).tolist()
    assert seen[0] > 8 * mixed.parts[0].rows_per_epoch  # the small one has begun again many times


def test_rows_do_not_depend_on_what_was_asked_before(mixed):
    again = MixedRows(mixed.parts, [30, 69, 1], seed=11)
    far = 3 * BLOCK + 77
    assert again.place(far) == mixed.place(far) == (1, int(mixed.counts(far)[1]))
    for i in (0, 5, BLOCK - 1, BLOCK, BLOCK + 1):
        assert again.place(i) == mixed.place(i)
    assert [mixed.place(i)[0] for i in range(60)] != [
        MixedRows(mixed.parts, [30, 69, 1], seed=12).place(i)[0] for i in range(60)
    ]


def test_where_rows_come_from_is_fixed_for_good(mixed):
    # A checkpoint's data cursor is only a row number: these may never change.
    assert [mixed.place(i)[0] for i in range(16)] == [1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 2, 1, 0, 1, 1, 0]


def test_rows_of_whole_documents_are_mixed_by_tokens_too(make_store):
    short, long = store_of(make_store, 0, [10] * 50), store_of(make_store, 1, [90] * 50)
    mixed = MixedRows([WholeDocuments(short, 64, seed=0), WholeDocuments(long, 64, seed=0)], [1, 1], seed=0)
    tokens = mixed.tokens_of(500)
    assert tokens[0] / sum(tokens) == pytest.approx(0.5, abs=0.01)
    # six short ones fill a row, and the fifty of them nine; long ones are cut to 64
    assert mixed.counts(500)[0] == pytest.approx(500 * 64 / (64 + 500 / 9), abs=8)


def test_one_weight_for_each_source(mixed):
    with pytest.raises(ValueError, match="3 parts, 2 weights"):
        MixedRows(mixed.parts, [1, 2], seed=0)
