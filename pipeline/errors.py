"""Errors a user can cause."""


class UserError(Exception):
    """Something the user can mend: one line naming the thing and the mend, printed without a traceback, exit code 2."""
