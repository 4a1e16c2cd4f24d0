"""Independent work in several processes, here or on a cluster, each with `settings.threads` threads.

On models of this size two processes of one thread each get more done than one of two threads. The results are
the same bytes with any number of workers and any joblib backend: `loky` (processes on this machine, the
default), `dask` or `ray` (a running cluster, by its address, else one that is started here). Workers pass
results on through the store, so all of them need it under the same path. On a cluster, work that a lost
worker had not finished is computed by another.
"""

import multiprocessing
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import joblib
import torch

from .errors import BadInput
from .machine import device

MOST_PROCESSES = 8  # unless $FEDMITR_JOBS says more
BYTES_EACH = 1.5e9  # memory that a process may need
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
VARIABLE, BACKEND, CLUSTER = "FEDMITR_JOBS", "FEDMITR_BACKEND", "FEDMITR_CLUSTER"
BACKENDS = ("loky", "dask", "ray")
# joblib replaces a worker whose memory has grown, and says so; nothing is lost by it.
warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
Item = TypeVar("Item")
Returned = TypeVar("Returned")
Call = tuple[Callable[..., object], tuple[Any, ...]]


def jobs() -> int:
    """Return the number of processes to use: $FEDMITR_JOBS, where it is set.

    Else one per GPU; without GPUs one per core, eight at most, fewer where memory is short.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        if device().type == "cuda":
            return torch.cuda.device_count()
        return max(1, int(min(joblib.cpu_count(), MOST_PROCESSES, memory() / BYTES_EACH)))
    if not given.isdecimal() or int(given) < 1:
        raise BadInput(f"{VARIABLE}={given!r} is not a number of processes: allowed are 1 and more")
    return int(given)


def memory() -> float:
    """Return the bytes of memory of this machine, or of the container that this process runs in."""
    found = [float("inf")]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in map(Path, MEMORY_LIMITS):
        if path.is_file() and (text := path.read_text().strip()).isdecimal():  # else "max"
            found.append(int(text))
    return min(found)


def backend() -> str:
    """Return the joblib backend, $FEDMITR_BACKEND; raise BadInput if it is unknown or not installed.

    Raises it too where $FEDMITR_CLUSTER is set with loky, which has no clusters.
    """
    name = os.environ.get(BACKEND, "loky")
    if name not in BACKENDS:
        raise BadInput(f"{BACKEND}={name!r} is unknown: allowed are {', '.join(BACKENDS)}")
    if name == "loky" and os.environ.get(CLUSTER):
        raise BadInput(
            f"{CLUSTER}={os.environ[CLUSTER]!r} needs a backend of clusters: allowed are dask, ray"
        )
    if name != "loky":
        try:
            __import__({"dask": "distributed", "ray": "ray.util.joblib"}[name])
        except ImportError:
            raise BadInput(f"{BACKEND}={name!r} is not installed: pip install 'fedmitr[{name}]'") from None
    return name


def spreads() -> bool:
    """Whether `parallel` gives several items to workers."""
    return backend() != "loky" or jobs() > 1


_IN_WORKERS: list[Call] = []


def in_workers(function: Callable[..., object], *args: Any) -> None:
    """Have every worker call function(*args) before its work: workers then know what is registered here."""
    _IN_WORKERS.append((function, args))


def parallel(function: Callable[[Item], Returned], items: Sequence[Item]) -> Iterator[tuple[int, Returned]]:
    """Yield (index, function(item)) for every item, in the order in which they finish.

    A single item is computed in this process, and so are all where there is one process; else workers
    compute.
    """
    if len(items) <= 1 or not spreads():
        yield from ((i, function(item)) for i, item in enumerate(items))
        return
    with workers(backend(), min(jobs(), len(items))) as pool:
        yield from pool(
            joblib.delayed(_in_worker)(os.getpid(), _IN_WORKERS, function, i, item)
            for i, item in enumerate(items)
        )


@contextmanager
def workers(name: str, processes: int) -> Iterator[joblib.Parallel]:
    """Start a backend's workers, or connect to those of the cluster at $FEDMITR_CLUSTER.

    processes: how many to start where there is no cluster. Raises BadInput for a cluster that cannot be
    reached.
    """
    address = os.environ.get(CLUSTER)
    with ExitStack() as stack:
        try:
            if name == "dask":
                stack.enter_context(_dask(address, processes))
            elif name == "ray":
                stack.enter_context(_ray(address, processes))
        except (OSError, ValueError) as error:  # no such host, no connection, not an address
            if not address:
                raise
            raise BadInput(f"{CLUSTER}={address!r}: cannot connect to a {name} cluster") from error
        many = processes if name == "loky" else -1
        order = "list" if name == "ray" else "generator_unordered"  # Ray's backend returns lists only
        with joblib.parallel_config(backend=name):
            yield joblib.Parallel(n_jobs=many, return_as=order)


@contextmanager
def _dask(address: str | None, processes: int) -> Iterator[None]:
    """Connect to a dask cluster, or start one for the time of the with-block."""
    from distributed import Client, LocalCluster

    with ExitStack() as stack:
        if not address:
            local = LocalCluster(n_workers=processes, threads_per_worker=1, dashboard_address=None)
            address = stack.enter_context(local).scheduler_address
        stack.enter_context(Client(address, set_as_default=True))
        yield


@contextmanager
def _ray(address: str | None, processes: int) -> Iterator[None]:
    """Connect to a Ray cluster, or start one for the time of the with-block."""
    import ray
    from ray.util.joblib import register_ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    here = {"num_cpus": processes, "include_dashboard": False}
    ray.init(address=address or "local", ignore_reinit_error=True, **({} if address else here))
    try:
        register_ray()
        yield
    finally:
        ray.shutdown()


def _in_worker(
    parent: int, calls: Sequence[Call], function: Callable[[Item], Returned], index: int, item: Item
) -> tuple[int, Returned]:
    """Return (index, function(item)), computed in a worker process.

    Before, make the `calls` of `in_workers`. A worker starts no processes of its own, shows no progress bar,
    and where there are several GPUs takes the one of its number. parent: the process id of the caller.
    """
    if os.getpid() == parent:  # joblib computes in the caller itself where a cluster has a single worker
        return index, function(item)
    for call, args in calls:
        call(*args)
    os.environ[VARIABLE] = os.environ["FEDMITR_STATIC"] = "1"
    os.environ[BACKEND] = "loky"
    os.environ.pop(CLUSTER, None)
    if torch.cuda.is_available():
        number = re.search(r"\d+$", multiprocessing.current_process().name)  # LokyProcess-3
        torch.cuda.set_device(int(number[0] if number else os.getpid()) % torch.cuda.device_count())
    return index, function(item)
