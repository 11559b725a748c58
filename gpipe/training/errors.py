"""What stops a run with a message in place of a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mishap whose message says all the user needs; ``exit_code`` is that of the command.

    UserError
     ├── ConfigurationError   2: found before any work
     ├── RunError             1: found on the way
     ├── Interrupted          130, 143: asked for by a signal
     └── Silent               another process, or this one, has said all there is to say
    """

    exit_code = 1


class ConfigurationError(UserError):
    """What is wrong with a configuration, the command's arguments or the folder they name.

    Args:
        source: the file, or whatever else is at fault.
        problems: one line each, ``key: what is wrong``.
    """

    exit_code = 2

    def __init__(self, source: object, problems: Sequence[str]) -> None:
        self.source = str(source)
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(f"{source}: {self.problems[0]}")
        else:
            lines = "".join(f"\n  {problem}" for problem in self.problems)
            super().__init__(f"{source}: {len(self.problems)} problems{lines}")


class RunError(UserError):
    """A run, a save or an evaluation cannot go on."""


class Interrupted(UserError):
    """A signal asked the run to stop, and it did so in good order."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Silent(UserError):
    """The command ends, and nothing is left to be said about it in this process."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("see what another process said")
        self.exit_code = exit_code
