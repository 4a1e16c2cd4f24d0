"""Seconds of iterations, the machine's peak speed and its memory: the instruments of `bench`."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

from ..core.machine import device
from ..core.rng import make_rng

SIDE = 2048  # of the square matrices whose product is the machine's peak
Tick = Callable[[int], object]  # called after each iteration of a loop


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch compute with so many threads; None leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stopwatch(loop: Callable[[Tick], object], skip: int, update: Tick) -> list[float]:
    """Return the seconds of each iteration of a loop after the first `skip`, which must be one at least.

    The loop calls what it is given after each iteration; `update` is called with 1 each time.
    """
    ends = []

    def tick(_: int) -> None:
        if device().type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        update(1)

    loop(tick)
    return [end - start for start, end in pairwise(ends[skip - 1 :])]


def median(runs: list[list[float]]) -> float:
    """Return the median over all iterations of all runs."""
    return statistics.median(seconds for run in runs for seconds in run)


def speedup(slow: list[list[float]], fast: list[list[float]]) -> float:
    """Return how many times faster `fast` is: the median over neighbouring runs of their medians' ratio."""
    pairs = zip(slow, fast, strict=True)
    return statistics.median(statistics.median(one) / statistics.median(other) for one, other in pairs)


def peak_gflops(precision: str) -> list[float]:
    """Measure the GFLOP/s of the product of two square matrices, a few times."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    rng = make_rng(0, "bench", "peak")
    left, right, product = (torch.randn(SIDE, SIDE, generator=rng).to(device(), kind) for _ in range(3))
    repeats = 20 if device().type == "cuda" else 1  # enough work that waiting for its end costs little

    def loop(tick: Tick) -> None:
        for step in range(4):
            for _ in range(repeats):
                torch.mm(left, right, out=product)
            tick(step)

    return [2 * SIDE**3 * repeats / seconds / 1e9 for seconds in stopwatch(loop, 1, lambda _: None)]


def peak_memory_mb() -> float | None:
    """Return the most memory so far in MB: allocated on CUDA, else resident; None where it is unknown."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, elsewhere KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
