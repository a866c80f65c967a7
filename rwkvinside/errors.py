"""The three ways a command ends early, each with its own exit code. Knows nothing of the rest of the package."""


class UserError(Exception):
    """Bad input or configuration: one line of cause, one line of cure; the command exits with 2.

    Args:
        cause: what was given and what is wrong with it, with the value.
        cure: what is allowed or what to do; may be empty when the cause says it already.
    """

    exit_code = 2

    def __init__(self, cause: str, cure: str = ""):
        super().__init__(cause if not cure else f"{cause}\n{cure}")
        self.cause = cause
        self.cure = cure


class VerificationError(UserError):
    """An exported model does not reproduce the trained one; the command exits with 3."""

    exit_code = 3


class Interrupted(UserError):
    """The run was asked to stop and has saved its work; the command exits with 75 (EX_TEMPFAIL: try again)."""

    exit_code = 75
