"""Exceptions: a user's mistake, which commands answer with one line and exit status 2, and a record to be skipped."""


class UserError(Exception):
    """A user's mistake. Its message is one line: what was wrong, what was expected, what to do."""


class UnreadableRecord(Exception):
    """Record that cannot be read, or whose picture or caption cannot be used. Its message says why."""


class StorageError(UserError):
    """A disk or bucket cannot be read or written, as it could before."""
