"""The exception for users' mistakes, which commands answer with one line and exit status 2."""


class UserError(Exception):
    """A user's mistake. Its message is one line: what was wrong, what was expected, what to do."""
