"""What a script says in one line before it exits, and the exit codes of a run (docs/reliability.md)."""

REFUSED = 2
"""what was asked for cannot be"""
PREEMPTED = 75
"""stopped by SIGTERM or SIGINT with nothing lost: start it again (EX_TEMPFAIL of sysexits.h)"""
HUNG = 76
"""no step ended within its deadline"""
BAD_NUMBERS = 77
"""too many steps with a loss or gradient that is not finite"""
NOT_SAVED = 78
"""a checkpoint could not be saved"""


class ConfigError(ValueError):
    """A field, the value it has, and a value that works, in one line."""


class RunStopped(Exception):
    """A run that ends before its last step, or without its last checkpoint.

    Args:
      message: one line: what happened, and what to do.
      code: the exit code of a script that it ends.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code
