"""What a user sees of a talk: lines that break between words, two columns in 80, numbers, commands."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from rwkvinside.errors import UserError
from rwkvinside.talk.conversation import Memory, Reply
from rwkvinside.talk.screen import Screen, printable, status_line, wrapped

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on in the warm sun of the afternoon. " * 2


class Voice:
    """Stands in for a conversation: says a text word by word, and counts what it is told to do."""

    def __init__(self, text=TEXT, positions=512):
        self.text, self.words, self.resets = text, [], 0
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions))
        self.memory, self.last, self.state_bytes = Memory(ids=list(range(1234))), None, 10_240

    def say(self, words, stop):
        self.words.append(words)
        for piece in self.text.split(" "):
            if stop():
                return
            yield piece + " "
        self.last = Reply(100, 1234, 12.34, 3.0, True)

    def reset(self):
        self.resets += 1


def talked(lines, terminal=True, **voices):
    voices = voices or {"student": Voice()}
    out = io.StringIO()
    console = Console(file=out, width=80, height=24, force_terminal=terminal, highlight=False, no_color=True)
    Screen(voices, console, console).talk(iter(lines))
    return voices, out.getvalue()


def visible(text):
    """Lines without escape codes, as they stand at the end."""
    import re

    return [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line).rstrip() for line in text.split("\n")]


def test_lines_break_between_words():
    for size in (1, 3, 7, 1000):
        written = []
        put = wrapped(written.append, 40)
        for start in range(0, len(TEXT), size):
            put(TEXT[start : start + size])
        put("\n")
        lines = "".join(written).split("\n")
        assert max(map(len, lines)) <= 40 and len(lines) > 4
        assert " ".join(" ".join(lines).split()) == TEXT.strip()


def test_lines_break_where_there_are_no_words():
    written = []
    put = wrapped(written.append, 20)
    for character in "語" * 45:
        put(character)
    put("\n")
    lines = "".join(written).rstrip("\n").split("\n")
    assert "".join(lines) == "語" * 45 and max(map(len, lines)) <= 10


def test_piped_text_is_left_as_it_is():
    _, out = talked(["hello"], terminal=False)
    assert TEXT.strip() in out


def test_a_model_cannot_control_the_terminal():
    assert printable("a\x1b[31mb\r\x07\tc\n") == "a[31mb\tc\n"


def test_two_replies_stand_side_by_side():
    voices, out = talked(["hello"], teacher=Voice("left " * 30), student=Voice("right " * 30))
    lines = visible(out)
    assert all(len(line) <= 80 for line in lines)
    both = [line for line in lines if "left" in line and "right" in line]
    assert len(both) >= 4 and all(line.startswith("left") and line.index("right") == 40 for line in both[-3:])
    assert voices["teacher"].words == voices["student"].words == ["hello"]


def test_numbers_fit_a_line():
    voice = Voice(positions=1000)
    list(voice.say("hello", lambda: False))
    assert status_line(voice) == "33.3 tokens/s · 100 new, 1,234 read in 12.34 s · state 10 KiB at 1,234"
    voices, out = talked(["hello"], teacher=Voice(), student=Voice())
    assert all(len(line) <= 80 for line in visible(out)), out
    assert out.count("beyond the 512 tokens") == 2


def test_commands():
    voices, out = talked(["/help", "", "/reset", "//etc", "/quit", "never"])
    assert voices["student"].resets == 1 and voices["student"].words == ["/etc"]
    for command in ("/save FILE", "/load FILE", "/reset", "a new talk"):
        assert command in out


@pytest.mark.parametrize(
    "line, cause",
    [
        ("/sav x", "no command /sav; did you mean /save?"),
        ("/save", "/save takes one file"),
        ("/reset now", "/reset takes nothing"),
        ("/save 'x", "No closing quotation"),
        ("/load nowhere", "there is no state at nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_talk_goes_on(line, cause):
    voices, out = talked([line, "hello"])
    assert cause in out and voices["student"].words == ["hello"]
    with pytest.raises(UserError, match=cause.split("?")[0].replace("/", ".")):
        talked([line, "hello"], terminal=False)
