"""The exceptions for mistakes in what a user gave, and for rates at which training diverged."""


class BadInput(ValueError):
    """An error of one line that names the setting, the value given and what is allowed."""


class Diverged(BadInput):
    """An error of one line: pixels or weights became NaN or Inf under the given learning rate."""
