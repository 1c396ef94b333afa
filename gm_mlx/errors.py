"""The one exception a user is meant to see."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right.

    The message is one line that names the file, the key and the remedy. The command line prints it as it is and exits
    with code 2; everything that is not a ``UserError`` is a bug of ours.
    """
