"""Independent work spread over processes or a cluster; each computes with `settings.threads` threads.

On models of this size two processes of one thread each get more done than one of two threads, and the
results are the same bytes however many workers there are, and whichever joblib backend starts them: `loky`
(processes here, the default), `dask` or `ray` (a cluster that runs already, by its address, else one that
is started here). Workers hand results on through the store, which all of them must see under the same path;
what a lost worker had not finished is computed by another.
"""

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import joblib
import torch

from .errors import BadInput
from .machine import device

MOST = 8  # processes by default
EACH = 1.5e9  # bytes of memory for each of them, with room to spare
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
VARIABLE, BACKEND, CLUSTER = "FEDMITR_JOBS", "FEDMITR_BACKEND", "FEDMITR_CLUSTER"
BACKENDS = ("loky", "dask", "ray")
Item = TypeVar("Item")
Made = TypeVar("Made")


def jobs() -> int:
    """Processes to use: $FEDMITR_JOBS, else one per core up to eight, fewer where memory is short.

    Where GPUs compute, one for each of them.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        if device().type == "cuda":
            return torch.cuda.device_count()
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


def backend() -> str:
    """The joblib backend, $FEDMITR_BACKEND; BadInput for one that is unknown, missing or without clusters."""
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
    """Whether `parallel` has workers to give several items to."""
    return backend() != "loky" or jobs() > 1


_IN_WORKERS: list[tuple[Callable[..., object], tuple[Any, ...]]] = []


def in_workers(function: Callable[..., object], *args: Any) -> None:
    """Have every worker make this call before its work: for what is registered in this process alone."""
    _IN_WORKERS.append((function, args))


def parallel(function: Callable[[Item], Made], items: Sequence[Item]) -> Iterator[tuple[int, Made]]:
    """function of every item, as (index, result), in the order in which they finish.

    One item, or one process, is computed here; else functions and items go to workers.
    """
    if len(items) <= 1 or not spreads():
        yield from ((i, function(item)) for i, item in enumerate(items))
        return
    with workers(backend(), min(jobs(), len(items))) as pool:
        yield from pool(
            joblib.delayed(_alone)(os.getpid(), _IN_WORKERS, function, i, item)
            for i, item in enumerate(items)
        )


@contextmanager
def workers(name: str, processes: int) -> Iterator[joblib.Parallel]:
    """The workers of a backend: those of the cluster at $FEDMITR_CLUSTER, else this many processes here.

    Raises BadInput for a cluster that does not answer.
    """
    address = os.environ.get(CLUSTER)
    with ExitStack() as stack:
        try:
            if name == "dask":
                stack.enter_context(_dask(address, processes))
            elif name == "ray":
                stack.enter_context(_ray(address, processes))
        except (OSError, ValueError) as error:  # no such host, nobody there, no address
            if not address:
                raise
            raise BadInput(f"{CLUSTER}={address!r}: no {name} cluster answers there") from error
        many = processes if name == "loky" else -1
        order = "list" if name == "ray" else "generator_unordered"  # Ray's backend knows lists alone
        with joblib.parallel_config(backend=name):
            yield joblib.Parallel(n_jobs=many, return_as=order)


@contextmanager
def _dask(address: str | None, processes: int) -> Iterator[None]:
    from distributed import Client, LocalCluster

    with ExitStack() as stack:
        if not address:
            local = LocalCluster(n_workers=processes, threads_per_worker=1, dashboard_address=None)
            address = stack.enter_context(local).scheduler_address
        stack.enter_context(Client(address, set_as_default=True))
        yield


@contextmanager
def _ray(address: str | None, processes: int) -> Iterator[None]:
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


def _alone(
    parent: int,
    calls: Sequence[tuple[Callable[..., object], tuple[Any, ...]]],
    function: Callable[[Item], Made],
    index: int,
    item: Item,
) -> tuple[int, Made]:
    """In a worker: no further processes, no progress bar, and a GPU of its own where there are several.

    joblib computes in the parent process itself where a cluster has a single worker.
    """
    if os.getpid() == parent:
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
