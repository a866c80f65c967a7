import torch

from rwkvinside.data.batch import Batch, attention_mask_4d


def make_batch(segments):
    segment_ids = torch.tensor(segments, dtype=torch.int32)
    zeros = torch.zeros(segment_ids.shape, dtype=torch.int64)
    labels = torch.where(segment_ids > 0, 3, -100)
    return Batch(zeros, labels, zeros, segment_ids, rows=tuple(range(len(segments))))


# Two documents and padding; one document that fills the row (its id equals the next row's first); only padding.
SEGMENTS = [[1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 3, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]


def test_mask_is_its_definition():
    batch = make_batch(SEGMENTS)
    mask = attention_mask_4d(batch)
    B, T = batch.input_ids.shape
    assert mask.shape == (B, 1, T, T) and mask.dtype == torch.bool
    for b in range(B):
        for query in range(T):
            for key in range(T):
                same = SEGMENTS[b][query] == SEGMENTS[b][key] != 0 and key <= query
                assert mask[b, 0, query, key] == (same or key == query), (b, query, key)


def test_cu_seqlens_are_the_runs_of_equal_segments():
    batch = make_batch(SEGMENTS)
    expected, position = [0], 0
    for row in SEGMENTS:
        for t, segment in enumerate(row):
            position += 1
            if t + 1 == len(row) or row[t + 1] != segment:
                expected.append(position)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == expected == [0, 2, 5, 7, 14, 15, 16, 18, 21, 28]


def test_counts_and_device():
    batch = make_batch(SEGMENTS)
    assert batch.num_tokens == batch.num_targets == 16
    assert torch.equal(batch.mask, batch.segment_ids > 0)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.segment_ids.device.type == "meta" and moved.rows == (0, 1, 2, 3)
