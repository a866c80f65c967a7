from dataclasses import replace

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


def test_a_fixed_batch_is_the_same_with_numbers_that_many_share():
    """Documents end with empty ones, a power of two of them; targets with such that are not real, in eighths."""
    batch = make_batch([[1, 1, 1, 2, 3, 3, 4, 4]] * 2)
    batch = replace(batch, labels=batch.labels.index_fill(1, torch.tensor([0]), -100))
    other = make_batch([[1, 2, 2, 2, 2, 3, 4, 5], [1] * 4 + [2] * 4])
    other = replace(other, labels=other.labels.flatten().index_fill(0, torch.tensor([0, 5, 9]), -100).view(2, 8))
    fixed = batch.fixed()
    assert fixed.key == other.fixed().key == ((2, 8), 9, 14)
    assert fixed.documents.cu_seqlens.tolist() == [0, 3, 4, 6, 8, 11, 12, 14, 16]
    assert other.fixed().documents.cu_seqlens.tolist() == [0, 1, 5, 6, 7, 8, 12, 16, 16]
    assert fixed.documents.lengths is None and fixed.documents.longest == 8
    assert fixed.targets.real.all() and other.fixed().targets.real.tolist() == [True] * 13 + [False]
    assert torch.equal(other.fixed().targets.positions[:13], other.targets.positions)
    hidden = torch.arange(16.0).view(2, 8, 1)
    assert torch.equal(other.targets.take(hidden)[:, 0], hidden.flatten()[(other.labels != -100).flatten()])


def test_one_document_a_row_has_no_table():
    fixed = make_batch([[1] * 8] * 3).fixed()
    assert fixed.key == ((3, 8), 0, 24) and fixed.documents.lengths == (8, 8, 8)
    assert make_batch([[1, 1, 0]]).fixed() is None


def test_a_twin_takes_the_contents_of_others_in_its_own_memory():
    batch, other = make_batch([[1, 1, 1, 2]]).fixed(), make_batch([[1, 2, 2, 2]]).fixed()
    twin = batch.twin()
    places = [x.data_ptr() for x in (twin.input_ids, twin.documents.cu_seqlens, *twin.targets)]
    twin.overwrite(other)
    assert [x.data_ptr() for x in (twin.input_ids, twin.documents.cu_seqlens, *twin.targets)] == places
    assert twin.documents.cu_seqlens.tolist() == [0, 1, 4] and batch.documents.cu_seqlens.tolist() == [0, 3, 4]
    assert torch.equal(twin.segment_ids, other.segment_ids)
