"""The exception for mistakes in what a user gave."""


class BadInput(ValueError):
    """An error of one line that names the setting, the value given and what is allowed."""
