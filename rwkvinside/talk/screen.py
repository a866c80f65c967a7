"""A talk on a terminal, or by piped lines: replies as they are generated, of one model or of two side by side."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..errors import UserError
from ..support.text import did_you_mean, rounded_bytes, rounded_count
from ..training.stop_signal import StopSignal
from .conversation import Conversation, Memory
from .state_file import read_memory, write_memory

HELP = {
    "/save FILE": "keep the state, to go on from it another time",
    "/load FILE": "go on from a state that was kept",
    "/reset": "forget the talk, but not the system prompt",
    "/help": "this list",
    "/quit": "end the talk, as Ctrl-D does",
}
KEYS = "Ctrl-C ends a reply, Ctrl-D the talk"


class Screen:
    """Reads lines and shows what models reply.

    Args:
        voices: name -> conversation; of two, replies are in columns.
        console: standard output.
        status: where numbers go: standard error where the output is not a terminal.
    """

    def __init__(self, voices: Mapping[str, Conversation], console: Console, status: Console):
        self.voices, self.console, self.status = dict(voices), console, status

    def talk(self, lines: Iterator[str]) -> None:
        """Reply to each line until there are no more.

        Raises:
            UserError: a command that cannot be done, where nobody is there to correct it.
        """
        for line in lines:
            if not line.strip():
                continue
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if not self._command(line):
                        return
                elif not self._reply(line.removeprefix("/") if line.startswith("//") else line):
                    return
            except UserError as error:
                if not self.console.is_terminal:
                    raise
                self._note(" · ".join(filter(None, (error.cause, error.hint))))

    def _command(self, line: str) -> bool:
        """Do what a line that begins with a slash says; return whether the talk goes on."""
        try:
            name, *rest = shlex.split(line)
        except ValueError as error:
            raise UserError(f"{line.strip()}: {error}", "/help lists what there is") from error
        takes_file = {command.partition(" ")[0]: " " in command for command in HELP}
        if name not in takes_file:
            raise UserError(f"no command {name}{did_you_mean(name, takes_file)}", "/help lists what there is")
        if len(rest) != takes_file[name]:
            raise UserError(f"{name} takes {'one file' if takes_file[name] else 'nothing'}", "/help says more")
        if name == "/quit":
            return False
        if name == "/help":
            self.show_help()
        elif name == "/reset":
            for voice in self.voices.values():
                voice.reset()
            self._note("a new talk")
        elif name == "/save":
            voice = self._student
            written = write_memory(Path(rest[0]), voice.memory, voice.model)
            self._note(f"kept {len(voice.memory.ids):,} tokens in {rest[0]}, {rounded_bytes(written)}")
        else:
            self.load(Path(rest[0]))
        return True

    def load(self, file: Path) -> None:
        """Go on from a state; models other than the one that left it read its tokens."""
        memory = read_memory(file, self._student.model)
        for voice in self.voices.values():
            same = voice is self._student
            voice.recall(memory if same else Memory(memory.ids, None, memory.text, list(memory.messages)))
        self._note(f"goes on after {len(self._student.memory.ids):,} tokens of {file}")

    def show_help(self) -> None:
        """List the commands."""
        for command, text in HELP.items():
            self._note(f"{command:<12}{text}")
        self._note(f"{KEYS}; a line that begins with // is said with one slash")

    def greet(self) -> None:
        """Say who is there and what can be done."""
        for name, voice in self.voices.items():
            self._note(f"{name:<9}{described(voice)}")
        self._note(f"/help lists commands; {KEYS}")

    @property
    def _student(self) -> Conversation:
        return list(self.voices.values())[-1]

    def _reply(self, words: str) -> bool:
        """Show the reply to words; return whether the talk goes on."""
        with StopSignal() as signals:
            replies = {name: voice.say(words, lambda: bool(signals.received)) for name, voice in self.voices.items()}
            if len(replies) == 1:
                self._stream(next(iter(replies.values())))
            else:
                self._columns(replies)
            self._status()  # a Ctrl-C that comes too late for the reply does not end the talk
        return signals.received != signal.SIGTERM

    def _stream(self, pieces: Iterator[str]) -> None:
        out = self.console.file
        width = self.console.width if self.console.is_terminal else None
        write = wrapped(out.write, width)
        for piece in pieces:
            write(printable(piece))
            out.flush()
        write("\n")
        out.flush()

    def _columns(self, replies: dict[str, Iterator[str]]) -> None:
        """Show the replies side by side, token by token in turns."""
        texts = dict.fromkeys(replies, "")
        height = max(3, self.console.height - 6)
        with Live(console=self.console, refresh_per_second=8, transient=True) as live:
            running = dict(replies)
            while running:
                for name, pieces in list(running.items()):
                    piece = next(pieces, None)
                    if piece is None:
                        del running[name]
                    else:
                        texts[name] += printable(piece)
                if self.console.is_terminal:
                    live.update(self._table(texts, last=height))
        self.console.print(self._table(texts))

    def _table(self, texts: Mapping[str, str], last: int | None = None) -> Table:
        """Return texts in columns of equal width, with their last lines alone if `last` says how many."""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), width=self.console.width)
        for name in texts:
            table.add_column(name, ratio=1, overflow="fold", header_style="bold")
        width = (self.console.width - 3 * len(texts)) // len(texts)
        lines = ([*Text(text.strip()).wrap(self.console, width)] for text in texts.values())
        table.add_row(*(Text("\n").join(part[-last:] if last else part) for part in lines))
        return table

    def _status(self) -> None:
        for name, voice in self.voices.items():
            self._note((f"{name:<9}" if len(self.voices) > 1 else "") + status_line(voice))
            limit, seen = voice.model.config.max_position_embeddings, len(voice.memory.ids)
            if seen > limit >= seen - (voice.last.read + voice.last.tokens if voice.last else 0):
                self._note(f"{name}: from here on beyond the {limit:,} tokens that it was made for")

    def _note(self, line: str) -> None:
        self.status.print(Text(line, style="dim"), soft_wrap=True)


def described(voice: Conversation) -> str:
    """Return what a model is."""
    config = voice.model.config
    layers, mixers = config.num_hidden_layers, len(getattr(config, "rwkv_layers", ()))
    kinds = f"{mixers} of {layers} layers recurrent" if mixers else f"{layers} layers of attention"
    count = sum(p.numel() for p in voice.model.parameters())
    start = f", {len(voice.memory.ids)} tokens of a system prompt read" if voice.memory.ids else ""
    return f"{config.model_type}, {rounded_count(count)} parameters, {kinds}{start}"


def status_line(voice: Conversation) -> str:
    """Return the numbers of the last reply, within 70 columns; "" before the first."""
    if (reply := voice.last) is None:
        return ""
    speed = "" if reply.tokens_per_second is None else f"{reply.tokens_per_second:.1f} tokens/s · "
    state = f"state {rounded_bytes(voice.state_bytes)} at {len(voice.memory.ids):,}"
    return f"{speed}{reply.tokens} new, {reply.read:,} read in {reply.first_seconds:.2f} s · {state}"


def printable(text: str) -> str:
    """Return a text without what would control the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def wrapped(write: Callable[[str], object], width: int | None) -> Callable[[str], None]:
    """Return a function that writes pieces of text and breaks lines between words.

    Args:
        write: takes text.
        width: of a line in cells; None: lines are not broken.
    """
    column, waiting = 0, ""

    def put(piece: str) -> None:
        nonlocal column, waiting
        if width is None:
            write(piece)
            return
        *words, waiting = re.split(r"(?<=\s)|(?=\s)", waiting + piece)
        if cell_len(waiting) >= width:  # scripts without spaces
            words, waiting = [*words, *waiting], ""
        for word in words:
            size = cell_len(word)
            if word == "\n":
                column = 0
            elif column + size > width and column:
                write("\n")
                column, word = 0, word.lstrip(" ")
                column = cell_len(word)
            else:
                column += size
            write(word)
        if waiting == "\n":
            write(waiting)
            column, waiting = 0, ""

    return put
