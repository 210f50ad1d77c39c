"""The error a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: the message names the field or file, its value and what is allowed.

    The command line prints it without a traceback and ends with exit code 2.
    """
