import pytest
import torch

from rwkvinside.data.batch import Batch


def make_batch(segments):
    segment_ids = torch.tensor(segments, dtype=torch.int32)
    zeros = torch.zeros(segment_ids.shape, dtype=torch.int64)
    labels = torch.where(segment_ids > 0, 3, -100)
    return Batch(zeros, labels, zeros, segment_ids, rows=tuple(range(len(segments))))


# Two documents and padding; one document that fills the row (its id equals the next row's first); only padding.
SEGMENTS = [[1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 3, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]


def test_documents_are_the_runs_of_equal_segments():
    documents = make_batch(SEGMENTS).documents
    expected, position = [0], 0
    for row in SEGMENTS:
        for t, segment in enumerate(row):
            position += 1
            if t + 1 == len(row) or row[t + 1] != segment:
                expected.append(position)
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.cu_seqlens.tolist() == expected == [0, 2, 5, 7, 14, 15, 16, 18, 21, 28]
    assert documents.lengths == (2, 3, 2, 7, 1, 1, 2, 3, 7) and documents.longest == 7


@pytest.mark.parametrize(
    "segments, alone, padded",
    [
        ([[1, 1, 1], [1, 1, 1]], True, False),
        ([[1, 1, 0], [1, 1, 1], [0, 0, 0]], True, True),
        ([[1, 1, 2], [1, 1, 1]], False, False),
        ([[0, 1, 1], [1, 1, 1]], False, True),  # padded on the left: a document does not start its row
        ([[1, 0, 2]], False, True),
        ([[3], [4]], True, False),
    ],
)
def test_what_the_host_knows(segments, alone, padded):
    documents = make_batch(segments).documents
    assert (documents.alone, documents.padded) == (alone, padded)


def test_counts_and_device():
    batch = make_batch(SEGMENTS)
    assert batch.num_tokens == batch.num_targets == 16
    assert torch.equal(batch.mask, batch.segment_ids > 0)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.segment_ids.device.type == "meta" and moved.rows == (0, 1, 2, 3)
    assert moved.documents.cu_seqlens.device.type == "meta" and moved.documents.lengths == batch.documents.lengths
    assert moved.num_tokens == moved.num_targets == 16 and batch.input_ids.device.type == "cpu"


def test_twice():
    batch = make_batch(SEGMENTS)
    twice = batch.twice()
    assert twice.input_ids.shape == (8, 7) and twice.rows == 2 * batch.rows
    assert twice.documents.lengths == 2 * batch.documents.lengths and twice.num_targets == 32


def test_joined_rows_are_one_document_each():
    batch = make_batch(SEGMENTS)
    joined = batch.joined()
    assert torch.equal(joined.segment_ids, torch.tensor(SEGMENTS).clamp(max=1).int())
    assert torch.equal(joined.position_ids, torch.arange(7).expand(4, -1)) and joined.rows == batch.rows
    assert torch.equal(joined.labels, batch.labels) and joined.documents.lengths == (5, 2, 7, 4, 3, 7)
    assert not joined.goes_on.any()
