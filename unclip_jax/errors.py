"""Exceptions: a user's mistake, which commands answer with one line and exit status 2, and a record to be skipped."""


class UserError(Exception):
    """A user's mistake. Its message is one line: what was wrong, what was expected, what to do."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """Makes one line of a text, whose characters that would steer a terminal are written as escapes."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)


class UnreadableRecord(Exception):
    """Record that cannot be read, or whose picture or caption cannot be used. Its message says why, in one line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class StorageError(UserError):
    """A disk or bucket cannot be read or written, as it could before."""
