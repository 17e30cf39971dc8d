"""The one exception that a command turns into a single line and a non-zero exit."""


class UserError(Exception):
    """What the user gave cannot work: says in one line what was wrong, what was expected and what to do."""
