"""Costs that grow with clients and with workers: measured on this machine, and computed beyond it.

The method is FedMITR+. Local training grows with the images, not with the number of clients K. On the server
two costs grow with K: every view that the ensemble labels passes all K models, unless `distill.per_class` or
`distill.group` say otherwise, and the server holds all K models. Inversion shows each image to one client's
model alone (`fedmitr_plus.owners`); FedMITR as published shows it to all K.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import pandas as pd

from ..core.errors import BadInput
from ..core.processes import VARIABLE
from ..core.store import Store
from ..evaluation.plan import Stage, plan
from ..methods import find
from ..methods.fedmitr import synthetic_set
from ..settings import PROFILES, Settings
from .run import Experiment

METHOD = "fedmitr_plus"
CLIENTS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
# How the labels are made, as overrides of the settings.
WAYS: dict[str, Mapping[str, Any]] = {
    "every client": {},
    "groups of 100 clients": {"distill.group": 100},
    "one client a class": {"ensemble.mode": "class", "distill.per_class": 1},
}


def profiles(names: Sequence[str] = PROFILES, method: str = METHOD) -> pd.DataFrame:
    """Return one row a profile: the sizes of a run and, by its plan, the costs. Nothing is run."""
    return pd.DataFrame([_profile(name, method) for name in names]).set_index("profile")


def _profile(name: str, method: str) -> dict[str, Any]:
    s = Settings.load(name)
    stages = plan(method, s)
    return {
        "profile": name,
        "task": s.task.name,
        "model": s.model.name,
        "clients": s.partition.clients,
        "images": s.inversion.images,
        "iterations": s.inversion.iterations,
        "student steps": s.distill.steps,
        "TFLOP": sum(stage.flops for stage in stages) / 1e12,
        "memory, GB": max(stage.memory for stage in stages) / 1e9,
        "messages, MB": sum(stage.bytes for stage in stages) / 1e6,
    }


def projection(settings: Settings, counts: Sequence[int] = CLIENTS) -> pd.DataFrame:
    """Compute, by `plan`, the server's work and memory for each number of clients and each of `WAYS`.

    Columns: way, clients; "server, TFLOP", without local training; "memory, GB", the most that a server stage
    holds; "messages, MB", up and down. The number of images over all clients stays the same.
    """
    rows = []
    for way, overrides in WAYS.items():
        for count in counts:
            stages = plan(METHOD, settings.changed({"partition.clients": count, **overrides}))
            rows.append({"way": way, "clients": count, **_costs(stages)})
    return pd.DataFrame(rows)


def _costs(stages: Sequence[Stage]) -> dict[str, float]:
    server = [s for s in stages if s.stage != "clients"]
    return {
        "server, TFLOP": sum(s.flops for s in server) / 1e12,
        "memory, GB": max(s.memory for s in server) / 1e9,
        "messages, MB": sum(s.bytes for s in stages) / 1e6,
    }


def strong_scaling(
    settings: Settings, workers: Sequence[int], store: Store | Path | str | None = None, repeats: int = 2
) -> pd.DataFrame:
    """Time how long this machine takes to invert FedMITR+'s batches with each number of workers.

    Uploads come from the store; the batches are inverted anew each time. The fastest of `repeats` times is
    kept; one run before them starts the processes and is not timed. Columns: workers, seconds, "speed-up"
    against the first number. Raises BadInput for fewer batches than workers.
    """
    batches = -(-settings.inversion.images // settings.inversion.batch_size)
    if batches < max(workers):
        raise BadInput(
            f"workers={list(workers)}: there are only {batches} batches to share; allowed are {batches} at "
            "most, or a smaller inversion.batch_size"
        )
    uploads, settings = Experiment(settings, store).uploads_for(METHOD), find(METHOD).adapted(settings)
    seconds: dict[int, list[float]] = {count: [] for count in workers}
    for count in workers:
        for _ in range(repeats + 1):
            with tempfile.TemporaryDirectory() as folder, processes(count):
                start = time.perf_counter()
                synthetic_set(uploads, settings, Store(folder))
                seconds[count].append(time.perf_counter() - start)
    table = pd.DataFrame({"workers": workers, "seconds": [min(seconds[count][1:]) for count in workers]})
    return table.assign(**{"speed-up": table["seconds"].iloc[0] / table["seconds"]})


def worker_counts(most: int = 8) -> list[int]:
    """Return 1, 2, 4, 8 workers, as far as this machine has cores and not above `most`."""
    return [count for count in (1, 2, 4, 8) if count <= min(most, joblib.cpu_count())]


@contextmanager
def processes(count: int) -> Iterator[None]:
    """Spread work over this many processes (`core.processes.jobs`) inside the `with` block."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
