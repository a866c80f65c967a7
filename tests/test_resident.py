"""Peak memory belongs to the process that asks."""

import multiprocessing
import sys

import pytest
import torch

from rwkvinside.resident import forget_peak, peak_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="getrusage elsewhere")
SIZE = 400_000_000


def touch():
    block = torch.ones(SIZE // 4)
    assert block.numel()


def test_peak_counts_what_was_there_and_can_be_forgotten():
    touch()
    assert peak_bytes() > SIZE
    assert forget_peak()
    start = peak_bytes()
    touch()
    assert 0.95 * SIZE < peak_bytes() - start < 1.05 * SIZE


def test_peak_of_the_parent_is_not_inherited():
    """getrusage would report it, and everything measured from there would come out too small."""
    touch()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(peak_bytes) < SIZE
