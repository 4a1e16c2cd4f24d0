"""Progress bars and stopwatches."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


def static() -> bool:
    """Whether outputs are stored rather than watched ($FEDMITR_STATIC=1): no progress bars, no sliders."""
    return bool(os.environ.get("FEDMITR_STATIC"))


def progress(total: int, title: str, unit: str, delay: float = 0) -> tqdm:
    """Make a progress bar on stderr or in the notebook; it appears after `delay` seconds."""
    quiet = {"disable": True} if static() else {}  # else tqdm's own $TQDM_DISABLE decides
    return tqdm(total=total, desc=title, unit=unit, delay=delay, **quiet)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds that a with-block takes to seconds[stage]."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
