import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from rwkvinside.data.rows import (
    ContinuedRows,
    PackedRows,
    PaddedDocuments,
    ShuffledRows,
    WholeDocuments,
    document_order,
    whole_rows,
)

ORDER_0_0 = [3, 2, 1, 6, 0, 7, 4, 5]


def documents(count=23, seed=3):
    """Documents of 1 to 40 tokens in which every token of the corpus has a different id."""
    lengths = np.random.default_rng(seed).integers(1, 41, count)
    ends = np.cumsum(lengths)
    return [list(range(end - n, end)) for end, n in zip(ends, lengths, strict=True)]


@pytest.fixture(params=[2, 7, 16, 64, 5000])
def packed(request, make_store):
    return PackedRows(make_store(documents()), seq_len=request.param, seed=5)


@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_an_epoch_holds_every_token_and_every_target_once(packed, epoch):
    total = packed.tokens.num_tokens
    rows = range(epoch * packed.rows_per_epoch, (epoch + 1) * packed.rows_per_epoch)
    assert len(rows) == -(-total // packed.seq_len)
    inputs, targets = Counter(), Counter()
    for i in rows:
        row = packed.row(i)
        real = row["segment_ids"] > 0
        assert real.all() or i == rows[-1], "only the last row of an epoch has padding"
        inputs.update(row["input_ids"][real].tolist())
        targets.update(row["labels"][row["labels"] != -100].tolist())
    assert inputs == Counter(range(total))
    assert targets == Counter(token for d in documents() for token in d[1:])


def test_labels_positions_and_segments_at_every_place(packed):
    following = {a: b for d in documents() for a, b in zip(d, d[1:], strict=False)}
    owner = {token: n for n, d in enumerate(documents()) for token in d}
    for i in range(packed.rows_per_epoch + 2):
        row = packed.row(i)
        previous, position, segment = None, None, 0
        for t in range(packed.seq_len):
            if row["segment_ids"][t] == 0:
                assert (row["labels"][t], row["position_ids"][t], row["input_ids"][t]) == (-100, 0, 0)
                assert not row["segment_ids"][t:].any()
                break
            token = int(row["input_ids"][t])
            new = previous is None or owner[previous] != owner[token]
            position = 0 if new else position + 1
            segment += new
            assert row["position_ids"][t] == position and row["segment_ids"][t] == segment
            assert row["labels"][t] == following.get(token, -100)
            previous = token


def test_a_document_that_is_cut_goes_on_in_the_next_row(make_store):
    packed = PackedRows(make_store([list(range(10))]), seq_len=4, seed=0)
    batch = packed.batch([0, 1, 2])
    assert batch.input_ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert batch.labels.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, -100, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.documents.cu_seqlens.tolist() == [0, 4, 8, 10, 12]
    assert (batch.num_tokens, batch.num_targets, batch.rows) == (10, 9, (0, 1, 2))
    assert [batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype] == [torch.int64] * 3
    assert batch.segment_ids.dtype == torch.int32


def test_rows_do_not_depend_on_what_was_asked_before(make_store):
    store = make_store(documents())
    forward, other = PackedRows(store, 16, seed=9), PackedRows(store, 16, seed=9)
    numbers = range(5 * forward.rows_per_epoch)
    in_order = [forward.row(i) for i in numbers]
    for i in np.random.default_rng(0).permutation(len(numbers)):
        again = other.row(int(i))
        assert all(np.array_equal(in_order[i][name], again[name]) for name in again)


def test_seeds_and_epochs_have_different_orders():
    orders = {tuple(document_order(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_is_fixed_for_good():
    # A checkpoint's data cursor is only a row number: these numbers may never change.
    assert document_order(0, 0, 8).tolist() == ORDER_0_0
    code = "from rwkvinside.data.rows import document_order as f; print(f(0, 0, 8).tolist())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == str(ORDER_0_0)


def test_loss_mask_belongs_to_the_target(make_store):
    packed = PackedRows(make_store([[5, 6, 7, 8, 9]], loss=[[0, 0, 1, 0, 1]]), seq_len=3, seed=0)
    assert packed.batch([0, 1]).labels.tolist() == [[-100, 7, -100], [9, -100, -100]]


def test_padded_documents(make_store):
    padded = PaddedDocuments(make_store([[1, 2, 3, 4, 5], [6, 7], [8]]), max_len=4)
    assert len(padded) == padded.rows_per_epoch == 3
    assert (padded.num_truncated, padded.num_truncated_tokens) == (1, 1)
    batch = padded.batch([1, 0])
    assert batch.input_ids.tolist() == [[6, 7, 0, 0], [1, 2, 3, 4]]
    assert batch.labels.tolist() == [[7, -100, -100, -100], [2, 3, 4, 5]]
    assert batch.segment_ids.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert padded.batch([1, 2]).input_ids.tolist() == [[6, 7], [8, 0]]
    with pytest.raises(IndexError, match="row 3 of 3"):
        padded.row(3)


def test_whole_documents_share_rows(make_store):
    """Every document is whole and alone in its segment, and an epoch has each of them once."""
    found = WholeDocuments(make_store([[1] * 5, [2] * 3, [3] * 2, [4] * 9, [5] * 4]), seq_len=8, seed=0)
    assert found.rows_per_epoch == 3  # 9 cut to 8; 5 and 3; 4 and 2
    batch = found.batch(range(3))
    rows = {
        tuple(ids[real].tolist()): segments[real].tolist()
        for ids, segments, real in zip(batch.input_ids, batch.segment_ids, batch.mask, strict=True)
    }
    assert rows == {
        (4,) * 8: [1] * 8,
        (1,) * 5 + (2,) * 3: [1] * 5 + [2] * 3,
        (5,) * 4 + (3,) * 2: [1] * 4 + [2] * 2,
    }
    assert batch.num_tokens == found.tokens_in(3) == 22 and found.tokens_per_row == 22 / 3
    assert found.tokens_in(4) == 22 + found.batch([3]).num_tokens
    assert batch.num_targets == 8 + 4 + 2 + 3 + 1  # the token after the cut is one
    assert not batch.documents.alone


def test_rows_of_whole_documents_go_on_for_ever_and_depend_on_nothing_else(make_store):
    store = make_store(documents())
    first, again = WholeDocuments(store, 64, seed=1), WholeDocuments(store, 64, seed=1)
    count = first.rows_per_epoch
    epochs = [[first.pieces(e * count + i) for i in range(count)] for e in range(3)]
    for epoch in epochs:
        assert sorted(piece[0] for row in epoch for piece in row) == list(range(store.num_documents))
    assert epochs[0] != epochs[1] != epochs[2]
    assert [again.pieces(i) for i in reversed(range(3 * count))] == sum(epochs, [])[::-1]
    assert epochs[0] != [WholeDocuments(store, 64, seed=2).pieces(i) for i in range(count)]


def test_whole_documents_fill_rows():
    """No two rows could be one, and there is little padding."""
    lengths = np.random.default_rng(0).integers(1, 150, 2000)
    rows = whole_rows(lengths, 128)
    sizes = sorted(int(np.minimum(lengths[row], 128).sum()) for row in rows)
    assert sorted(sum(rows, [])) == list(range(2000))
    assert sizes[-1] <= 128 and sizes[0] + sizes[1] > 128
    assert sum(sizes) > 0.97 * 128 * len(rows)


@pytest.mark.parametrize(
    "make", [lambda s: PackedRows(s, 1, 0), lambda s: WholeDocuments(s, 1, 0), lambda s: PaddedDocuments(s, 1)]
)
def test_rows_of_one_token_are_refused(make, make_store):
    with pytest.raises(ValueError, match="leaves no token to predict"):
        make(make_store([[1, 2]]))


@pytest.mark.parametrize("seq_len", [2, 7, 16, 5000])
def test_shuffled_rows_are_the_packed_rows_of_each_epoch_in_another_order(make_store, seq_len):
    packed = PackedRows(make_store(documents()), seq_len=seq_len, seed=5)
    rows, size = ShuffledRows(packed), packed.rows_per_epoch
    epochs = [[rows.row(i)["input_ids"].tolist() for i in range(e * size, (e + 1) * size)] for e in range(3)]
    for epoch, read in enumerate(epochs):
        plain = [packed.row(i)["input_ids"].tolist() for i in range(epoch * size, (epoch + 1) * size)]
        assert sorted(read) == sorted(plain) and (size < 5 or read != plain)
        order = [plain.index(ids) for ids in read]
        assert size < 50 or np.mean(np.abs(np.diff(order)) == 1) < 0.1, "neighbors are apart"
    for count in (0, 1, size // 2, size - 1, size, size + 2, 3 * size - 1):
        assert rows.tokens_in(count) == sum(int((rows.row(i)["segment_ids"] > 0).sum()) for i in range(count))
    batch = rows.batch(range(size - 1, size + 1))
    assert batch.rows == (size - 1, size) and batch.input_ids[0].tolist() == epochs[0][-1]
    assert ShuffledRows(packed).pieces(size) == rows.pieces(size)  # of nothing but seed and number


@pytest.mark.parametrize("streams", [1, 3, 5, 40])
@pytest.mark.parametrize("seq_len", [7, 16, 64])
def test_streams_read_their_stretch_of_the_packed_rows_in_order(make_store, seq_len, streams):
    packed = PackedRows(make_store(documents()), seq_len=seq_len, seed=5)
    rows = ContinuedRows(packed, streams, run_on=False)
    laps = 3
    read = [rows.row(i)["input_ids"] for i in range(laps * rows.rows_per_epoch)]
    order = [packed.row(i)["input_ids"].tolist() for i in range(laps * rows.rows_per_epoch)]
    assert sorted(ids.tolist() for ids in read) == sorted(order), "each packed row once"
    assert not any(rows.row(i)["position_ids"][0] for i in range(rows.rows_per_epoch))
    for lap in range(laps):
        for stream in range(streams):
            begin = lap * rows.rows_per_epoch + stream
            own = [ids.tolist() for ids in read[begin : begin + rows.rows_per_epoch : streams]]
            at = lap * rows.rows_per_epoch + stream * len(own)
            assert own == order[at : at + len(own)]
    for count in (0, 1, streams, 2 * streams + 1, rows.rows_per_epoch - 1, rows.rows_per_epoch + 2):
        assert rows.tokens_in(count) == sum(int((rows.row(i)["segment_ids"] > 0).sum()) for i in range(count))


@pytest.mark.parametrize("seq_len", [5, 16])
def test_positions_run_on_in_a_document_from_where_the_stream_began_it(make_store, seq_len):
    owner = {token: n for n, d in enumerate(documents()) for token in d}
    rows = ContinuedRows(PackedRows(make_store(documents()), seq_len=seq_len, seed=5), streams=4, run_on=True)
    ran_on = 0
    for stream in range(4):
        before = None
        for step in range(3 * rows.stretch):
            row = rows.row(4 * step + stream)
            for t in range(int((row["segment_ids"] > 0).sum())):
                token, position = int(row["input_ids"][t]), int(row["position_ids"][t])
                lap_begins = t == 0 and step % rows.stretch == 0
                goes_on = not lap_begins and before is not None and before[0] == token - 1
                goes_on = goes_on and owner[before[0]] == owner[token]
                assert position == (before[1] + 1 if goes_on else 0)
                ran_on += goes_on and t == 0
                before = token, position
            assert bool(rows.batch([4 * step + stream]).goes_on[0]) == (row["position_ids"][0] > 0)
    assert ran_on > 20
