import io

import pytest

from rwkvinside.support import progress as module
from rwkvinside.support.progress import Progress, clock


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until it is moved."""
    seconds = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])
    return seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(stream):
    return stream.getvalue().splitlines()


def test_a_line_now_and_then_and_one_for_the_end(now):
    stream = io.StringIO()
    with Progress("rows", 1000, unit="rows", stream=stream) as progress:
        for _ in range(50):
            now[0] += 1
            progress.advance(20, f"loss {progress.done}")
    assert lines(stream) == [
        "rows 200/1,000 rows  loss 180  ETA 0:00:40",
        "rows 400/1,000 rows  loss 380  ETA 0:00:30",
        "rows 600/1,000 rows  loss 580  ETA 0:00:20",
        "rows 800/1,000 rows  loss 780  ETA 0:00:10",
        "rows 1,000/1,000 rows  loss 980  ETA 0:00:00",
    ]


def test_the_end_has_a_line_if_the_work_had_one(now):
    stream = io.StringIO()
    with Progress("tokenizing", unit="documents", stream=stream) as progress:
        now[0] += 11
        progress.update(7000, "123 tokens")
        now[0] += 3
        progress.update(9000, "456 tokens")
    assert lines(stream) == ["tokenizing 7,000 documents  123 tokens", "tokenizing 9,000 documents  456 tokens"]


def test_what_is_done_at_once_is_silent(now):
    for stream in (io.StringIO(), Terminal()):
        with Progress("rows", 10, stream=stream) as progress:
            progress.advance(10)
        assert stream.getvalue() == ""


def test_an_error_has_no_line_of_its_own(now):
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), Progress("rows", 10, stream=stream) as progress:
        now[0] += 11
        progress.advance()
        progress.advance()
        raise ZeroDivisionError
    assert lines(stream) == ["rows 1/10  ETA 0:01:39"]


def test_what_was_done_before_does_not_count_for_the_speed(now):
    stream = io.StringIO()
    with Progress("rows", 1000, done=900, stream=stream) as progress:
        now[0] += 20
        progress.advance(20)
        assert progress.rate == 1
    assert lines(stream) == ["rows 920/1,000  ETA 0:01:20"]


def test_without_an_interval_only_what_is_said():
    stream = io.StringIO()
    with Progress("align", 2, stream=stream, interval=None) as progress:
        progress.update(1)
        progress.say("a [line]")
    assert lines(stream) == ["a [line]"]


def test_a_terminal_has_a_bar_after_a_while(now):
    stream = Terminal()
    with Progress("rows [a]", 10, unit="rows", stream=stream) as progress:
        progress.advance()
        assert stream.getvalue() == ""
        now[0] += 1
        progress.advance(1, "loss 3")
        progress.say("a [line]")
    shown = stream.getvalue()
    assert "\x1b[" in shown and "a [line]" in shown and "rows [a]" in shown and "2/10" in shown and "loss 3" in shown


def test_a_part_has_lines_of_its_own(now):
    stream = io.StringIO()
    with Progress("align", 2, stream=stream, interval=None) as progress:
        with progress.part("1/2  evaluating", 40, unit="batches") as part:
            for _ in range(40):
                now[0] += 0.5
                part.advance()
        progress.say("align 1/2  eval: kl 0.1")
    assert lines(stream) == [
        "align 1/2  evaluating 20/40 batches  ETA 0:00:10",
        "align 1/2  evaluating 40/40 batches  ETA 0:00:00",
        "align 1/2  eval: kl 0.1",
    ]


def test_a_part_shares_the_bar_of_the_whole(now):
    stream = Terminal()
    with Progress("align", 2, stream=stream, delay=0) as progress:
        bar = progress._bar
        with progress.part("evaluating", 40, unit="batches") as part:
            now[0] += 1
            part.advance()
            assert part._bar is bar and [task.description for task in bar.tasks] == ["align", "align evaluating"]
            progress.say("a line")
        assert [task.description for task in bar.tasks] == ["align"] and progress._bar is bar
    assert "align evaluating" in stream.getvalue() and "a line" in stream.getvalue()


def test_a_part_that_cannot_print_does_not_end_the_work(now):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with Progress("align", 2, stream=Closed(), interval=None) as progress:
        with progress.part("evaluating", 2) as part:
            now[0] += 11
            part.advance(2)
        with pytest.raises(BrokenPipeError):
            progress.say("a line")


def test_durations():
    assert [clock(seconds) for seconds in (0.4, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]
