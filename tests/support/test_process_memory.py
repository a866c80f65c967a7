"""Peak memory belongs to the process that asks. Each case is a new process: an old one has free pages to reuse."""

import multiprocessing
import sys

import pytest
import torch

from rwkvinside.support import process_memory as resident
from rwkvinside.support.process_memory import forget_peak, peak_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="getrusage elsewhere")
SIZE = 400_000_000


def touch():
    assert torch.ones(SIZE // 4).numel()


def peaks():
    """Before and after a block was there, after it was forgotten, and after another one twice as large."""
    assert forget_peak()  # importing may have had its own
    start = peak_bytes()
    touch()
    first = peak_bytes()
    assert forget_peak()
    forgotten = peak_bytes()
    block = torch.ones(SIZE // 2)
    assert block.numel()
    return start, first, forgotten, peak_bytes()


def in_new_process(function):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function)


def test_peak_counts_what_was_there_and_can_be_forgotten():
    start, first, forgotten, second = in_new_process(peaks)
    assert 0.95 * SIZE < first - start < 1.1 * SIZE
    assert forgotten < first - 0.9 * SIZE
    assert 1.95 * SIZE < second - forgotten < 2.1 * SIZE


def test_peak_of_the_parent_is_not_inherited():
    """With getrusage it would be, and everything measured from there would come out too small."""
    touch()
    assert in_new_process(peak_bytes) < SIZE < peak_bytes()


def test_where_the_system_does_not_tell_getrusage_does(tmp_path, monkeypatch):
    status = tmp_path / "status"
    for text in (b"Name:\tgvisor\nVmRSS:\t1234 kB\n", None):
        if text is None:
            status.unlink()
        else:
            status.write_bytes(text)
        monkeypatch.setattr(resident, "_STATUS", status)
        assert peak_bytes() > 20e6
    status.write_bytes("Name:\tPythön\nVmHWM:\t   1234 kB\n".encode("latin-1"))
    assert peak_bytes() == 1234 * 1024
