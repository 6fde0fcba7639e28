"""Errors a user can cause, and that of a rank that is gone."""

import errno
import reprlib

LOST_RANK = 3
"""Exit code: a rank died, stalled or cannot be reached. The same command starts again from the last checkpoint."""
LOST_PEER = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket Timeout",
    "remote process exited or there was a network error", "NCCL error",
)  # fmt: skip
"""What gloo and NCCL say on the ranks that are left when another has gone."""


class UserError(Exception):
    """Something the user can fix: one line naming the thing and the fix, printed without a traceback, exit code 2."""

    reported = False
    """Whether it has been printed."""


class RankError(UserError):
    """A UserError of one rank alone, where the ranks cannot share it: that rank prints it."""


class DeviceLostError(RankError):
    """A GPU that runs nothing more in this process, as after an illegal access: no other path can take over."""


class LostRankError(Exception):
    """Another rank cannot go on: it died, stalled, cannot be reached, or was ended by an exception of its own.

    `code`: what the job exits with: LOST_RANK, or the code of the exception there, which starting again would meet
    again. `should_report`: whether this rank is the one to print it, of those that know.
    """

    def __init__(self, reason: str, *, code: int, should_report: bool) -> None:
        super().__init__(reason)
        self.code, self.should_report = code, should_report


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER)


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 80, 80, 80


def shown(value: object) -> str:
    """A value out of a file, as Python spells it, in one short line; of a long one the beginning and the end."""
    return brief(_REPR.repr(value))


def brief(value: object, limit: int = 160) -> str:
    """An exception's message, or any text of a file, in one line of at most `limit` characters.

    What cannot be printed is escaped: it may be what is wrong with the file.
    """
    line = " ".join(str(value).split())
    line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def out_of_space(error: BaseException) -> bool:
    """Whether a disk is full, or a quota is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def of_a_file(error: BaseException) -> bool:
    """Whether the system refuses a file by its name: it is not there, may not be read, or its disk fails."""
    return isinstance(error, OSError) and error.filename is not None
