"""The one exception a script turns into one line on stderr and exit status 2."""


class UserError(Exception):
    """Something only the user can mend: the message says what is wrong and what to do, in one line."""
