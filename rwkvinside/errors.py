"""The ways a command ends early, each with its own exit code. Imports nothing of the package."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

CTRL_C = 128 + 2  # what shells report of a process that SIGINT has ended
CLOSED_PIPE = 128 + 13  # the same of SIGPIPE
CONTINUE = "continue with --resume"  # what to do after `Interrupted`; commands say it in full


class UserError(Exception):
    """Bad input or configuration: one line of cause and one of advice.

    A command that raises it exits with 2.

    Args:
        cause: what was given and what is wrong with it, with the value.
        hint: what is allowed or what to do; may be empty if the cause already says it.
        problems: a line each below the cause, where several things are wrong at once.

    What is quoted in them, such as a key with a line break or an escape code of a terminal, stays within its line.
    """

    exit_code = 2

    def __init__(self, cause: str, hint: str = "", problems: Sequence[str] = ()):
        self.cause = "\n  ".join(map(_one_line, (cause, *problems)))
        self.hint = _one_line(hint)
        super().__init__("\n".join(filter(None, (self.cause, self.hint))))


class VerificationError(UserError):
    """An exported model does not reproduce the trained one; the command exits with 3."""

    exit_code = 3


class Interrupted(UserError):
    """A run that was asked to stop and has saved its work.

    The command exits with 75 (EX_TEMPFAIL: try again).
    """

    exit_code = 75


def report_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Make a main function print a `UserError` on stderr and return its exit code.

    Ctrl-C before there is something to save is one line and `CTRL_C`; a closed pipe, as of `| head`, is silent and
    `CLOSED_PIPE`; any other reason why nothing can be printed, as a full disk, is a line and 2, and so is what the
    system refuses about a file. Under a launcher, which sets RANK, only rank 0 prints, because all ranks raise the same
    error.
    """

    @functools.wraps(main)
    def reporting(argv: list[str] | None = None) -> int:
        _open_streams()
        try:
            try:
                _check_current_directory()
                code = main(argv)
            finally:
                sys.stdout.flush()  # what is still to be written, as by --help, may find the pipe closed
            return code
        except KeyboardInterrupt:
            _forget_interrupt()
            _say("interrupted")
            return CTRL_C
        except UserError as error:
            _forget_interrupt()
            _say(f"error: {error.cause}", error.hint)
            return error.exit_code
        except OSError as error:
            if (code := _end_of(error)) is None:
                raise
            return code

    return reporting


def _end_of(error: OSError) -> int | None:
    """Say in a line what the system refuses, and return the exit code.

    None: neither about a file nor about what is printed, so it is no more than a fault of this program.
    """
    lost = next((stream for stream in (sys.stdout, sys.stderr) if _is_lost(stream)), None)
    if lost is not None:
        _drop(lost)
        if isinstance(error, BrokenPipeError):
            return CLOSED_PIPE
        what, hint = "nothing more can be printed", "give the output another place; a run goes on with --resume"
    elif error.filename is not None:
        what, hint = f"{error.filename!s:.300}", "check the path and its file system; a run goes on with --resume"
    else:
        return None
    _say(_one_line(f"error: {what}: {error.strerror}"), hint)
    return UserError.exit_code


def _check_current_directory() -> None:
    """Refuse to begin in a directory that was removed: libraries ask for it wherever a path is relative.

    Raises:
        UserError: it was.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the current directory does not exist any more", "change into another one") from error


def _forget_interrupt() -> None:
    """Let the exit code count.

    A KeyboardInterrupt that went through `exec` of a text, as of a dataclass that is made during an import, is noted by
    CPython until the next one, and in the end SIGINT instead of the exit code tells of it.
    """
    exec("")


def _open_streams() -> None:
    """Open the standard streams that were closed, as of `>&-`: else the next file that is opened would be one.

    What their encoding does not have becomes a question mark.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def _say(*lines: str) -> None:
    """Print lines on stderr, if it can be written, those that are not empty."""
    rank = os.environ.get("RANK", "")
    if not rank.isdecimal() or not rank.strip("0"):
        try:
            print(*filter(None, lines), sep="\n", file=sys.stderr, flush=True)
        except OSError:
            _drop(sys.stderr)


def _is_lost(stream: TextIO) -> bool:
    """Return whether nothing can be written to a standard stream."""
    try:
        os.write(stream.fileno(), b"\n")
    except ValueError:  # it is no file
        return False
    except OSError:
        return True
    return False


def _drop(stream: TextIO) -> None:
    """Let a standard stream go nowhere: Python flushes it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _one_line(text: str) -> str:
    """Return a text without line breaks, and with what cannot be printed as Python would write it."""
    joined = " ".join(line.strip() for line in text.split("\n")) if "\n" in text else text
    return joined if joined.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in joined)
