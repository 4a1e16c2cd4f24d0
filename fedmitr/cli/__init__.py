"""The command line: about.py, runs.py and evidence.py have the commands.

Progress goes to stderr. Bad input is one line on stderr and exit status 2, before any work.
"""

from . import about, evidence, runs
from .options import main

__all__ = ["about", "evidence", "main", "runs"]
