"""The exceptions that a script turns into one line on stderr and exit status 2."""


class UserError(Exception):
    """Something only the user can mend: the message says what is wrong and what to do, in one line."""


class RunError(UserError):
    """Ends a run that was well begun: what it has saved stays."""
