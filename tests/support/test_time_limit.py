"""Loops that do not end, in the main thread and in others; what ends in time is left alone."""

import itertools
import threading
import time

import pytest

from rwkvinside.support.time_limit import TimeExceeded, time_limit


def loop():
    try:
        for i in itertools.count():
            i + 1
    except Exception:  # what a template engine may do with whatever goes wrong
        loop()


def test_a_loop_is_ended():
    start = time.monotonic()
    with pytest.raises(TimeExceeded), time_limit(0.1):
        loop()
    assert 0.1 <= time.monotonic() - start < 5


def test_in_another_thread():
    ended = []

    def work():
        try:
            with time_limit(0.1):
                loop()
        except TimeExceeded:
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert ended and not thread.is_alive()


def test_what_ends_in_time_is_left_alone():
    with time_limit(0.2):
        pass
    time.sleep(0.4)
    with pytest.raises(KeyError), time_limit(10):
        raise KeyError
    assert threading.active_count() < 20


def test_an_end_at_the_last_moment_interrupts_nothing_after_it():
    """Whether it comes too late or in time: after the block there is peace."""
    for i in range(200):
        try:
            with time_limit(0.001):
                time.sleep(0.0009 + i * 1e-6)
        except TimeExceeded:
            pass
        sum(range(3000))
