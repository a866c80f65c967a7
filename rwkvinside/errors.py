"""The ways a command ends early, each with its own exit code. Imports nothing of the package."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence

CTRL_C = 128 + 2  # what shells report of a process that SIGINT has ended
CLOSED_PIPE = 128 + 13  # the same of SIGPIPE


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
    `CLOSED_PIPE`. Under a launcher, which sets RANK, only rank 0 prints, because all ranks raise the same error.
    """

    @functools.wraps(main)
    def reporting(argv: list[str] | None = None) -> int:
        try:
            code = main(argv)
            sys.stdout.flush()  # what is still to be written may find the pipe closed
            return code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
            return CLOSED_PIPE
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":
                print("interrupted", file=sys.stderr)
            return CTRL_C
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error.cause}", file=sys.stderr)
                if error.hint:
                    print(error.hint, file=sys.stderr)
            return error.exit_code

    return reporting


def _one_line(text: str) -> str:
    """Return a text without line breaks, and with what cannot be printed as Python would write it."""
    joined = " ".join(line.strip() for line in text.split("\n")) if "\n" in text else text
    return joined if joined.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in joined)
