"""What the tests of faults share: how many of a kind are tried, and how a command may end.

SEED=7 FAULTS=full in the environment choose other faults, and as many as `make test-faults` tries.
"""

import os
import signal
from contextlib import contextmanager

import pytest

SEED = os.environ.get("SEED", "0")
FULL = {"small": False, "full": True}[os.environ.get("FAULTS", "small")]
PATIENCE = 60  # seconds that a command on tiny files may take


def faults(kind, small, full):
    """Parametrize a test over the faults of a kind by `number`; `rng` differs between them."""
    count = full if FULL else small

    def decorate(test):
        return pytest.mark.faults(kind)(pytest.mark.parametrize("number", range(count))(test))

    return decorate


def run(main, *argv):
    """Call a command within a time limit; return its exit code."""
    with time_limit(PATIENCE):
        return main([str(word) for word in argv])


@contextmanager
def time_limit(seconds):
    """Raise `TimeoutError` in the main thread when what is inside takes longer."""

    def expire(number, frame):
        raise TimeoutError(f"not done within {seconds} seconds")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def assert_survived(code, error):
    """Fail unless a command has worked, or has refused in a line and one of advice (or a list of problems)."""
    assert "Traceback" not in error, error
    if code != 0:
        assert code in (2, 3), error
        said = error[error.index("error: ") :]
        lines = said.rstrip("\n").split("\n")
        assert len(lines) <= 2 or "problems in the configuration:" in lines[0], said
        assert len(lines[0]) > len("error: "), said
        assert all(character.isprintable() for line in lines for character in line), repr(said)
