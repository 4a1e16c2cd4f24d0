"""`python -m fedmitr.cli` is `fedmitr`."""

from . import main

main()
