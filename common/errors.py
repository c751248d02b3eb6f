"""The ways a command ends early, and the exit status each one maps to.

A message is one line and names the value, the limit it breaks and the remedy. A traceback that reaches
the user is a bug, except with ``--debug``.
"""


class SaexError(Exception):
    """A failure that is not the fault of the input: exit status 1."""

    exit_status = 1


class InputError(SaexError):
    """Input that cannot be used: exit status 2.

    ``problem`` names the value and the limit, ``remedy`` says what to do about it.
    """

    exit_status = 2

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem
        self.remedy = remedy


class PreemptedError(SaexError):
    """SIGTERM arrived and the work in hand is committed: exit status 75, "run me again"."""

    exit_status = 75


class Superseded(SaexError):  # noqa: N818 - the other process is the one to look at
    """Another process has taken this one's place; what it writes to belongs to that one."""


class ShareDone(SaexError):  # noqa: N818 - no error
    """Not a failure: this worker's part of the work is done, and others still have theirs to do."""

    exit_status = 0
