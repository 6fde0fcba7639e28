"""Errors a user can cause."""


class UserError(Exception):
    """Something the user can mend: one line naming the thing and the mend, printed without a traceback, exit code 2."""


class RankError(UserError):
    """A UserError that one rank alone knows of, before the ranks can agree: that rank prints it."""


class LostRankError(Exception):
    """A rank died, stalled or cannot be reached: the job is started again as it was. Exit code 3.

    `speaks`: whether this rank is the one to print it, of those that know.
    """

    def __init__(self, reason: str, *, speaks: bool) -> None:
        super().__init__(reason)
        self.speaks = speaks
