"""The one exception that a command turns into a single line and a non-zero exit."""


class UserError(Exception):
    """User's mistake: one line says what was wrong, what was expected and what to do."""
