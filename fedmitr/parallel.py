"""Independent work spread over processes; every process computes with `settings.threads` threads.

On models of this size two processes of one thread each get more done than one of two threads, and the
results are the same bytes however many processes there are. Workers hand results on through the store.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import joblib

from .errors import BadInput
from .runtime import device

MOST = 8  # processes by default
EACH = 1.5e9  # bytes of memory for each of them, with room to spare
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
VARIABLE = "FEDMITR_JOBS"
Item = TypeVar("Item")
Made = TypeVar("Made")


def jobs() -> int:
    """Processes to use: $FEDMITR_JOBS, else one per core up to eight, fewer where memory is short.

    One where a GPU computes.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        if device().type == "cuda":
            return 1
        return max(1, int(min(joblib.cpu_count(), MOST, memory() / EACH)))
    if not given.isdecimal() or int(given) < 1:
        raise BadInput(f"{VARIABLE}={given!r} is not a number of processes: allowed are 1 and more")
    return int(given)


def memory() -> float:
    """Bytes of memory that this machine, or the container that it is, may use."""
    found = [float("inf")]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in map(Path, LIMITS):
        if path.is_file() and (text := path.read_text().strip()).isdecimal():  # else "max"
            found.append(int(text))
    return min(found)


def parallel(function: Callable[[Item], Made], items: Sequence[Item]) -> Iterator[tuple[int, Made]]:
    """function of every item, as (index, result), in the order in which they finish.

    One item, or one process, is computed here; else functions and items go to worker processes.
    """
    processes = min(jobs(), len(items))
    if processes <= 1:
        yield from ((i, function(item)) for i, item in enumerate(items))
        return
    pool = joblib.Parallel(n_jobs=processes, return_as="generator_unordered")
    yield from pool(joblib.delayed(_alone)(function, i, item) for i, item in enumerate(items))


def _alone(function: Callable[[Item], Made], index: int, item: Item) -> tuple[int, Made]:
    """In a worker: no further processes, and no progress bar."""
    os.environ[VARIABLE] = os.environ["FEDMITR_STATIC"] = "1"
    return index, function(item)
