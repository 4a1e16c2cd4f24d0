"""The one exception that a user is meant to read."""


class BadInput(ValueError):
    """One line that names the setting, the value given and what is allowed."""
