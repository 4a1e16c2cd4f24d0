"""Several methods on the same clients over several seeds, and what that says."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from ..core.processes import parallel
from ..core.progress import progress
from ..core.store import check_writable, write_csv
from ..settings import Settings
from .result import Result
from .run import Experiment

COLUMNS = ("method", "task", "alpha", "clients", "seed", "accuracy")
ACCOUNT = (
    "exchanges",
    "upload_bytes",
    "download_bytes",
    "synthetic_images",
    "student_steps",
    "inference_flops",
)
SECONDS = ("client_seconds", "server_seconds")


def compare(
    methods: Sequence[str],
    settings: Sequence[Settings],
    store: Path | str | None = None,
    out: Path | None = None,
) -> pd.DataFrame:
    """One row per method and setting; finished runs come from the store.

    Rewrites the CSV `out`, and beside it the times (`seconds_file`), after every run.
    """
    if out:
        check_writable(out.parent, f"out={str(out)!r}")
    everyone = [Experiment(one, store) for one in settings]
    for experiment in everyone:  # all of them before the first is run
        experiment.check(methods)
    clients = {e.upload_key(k): (e.settings, k) for e in everyone for k in range(len(e.shards))}.values()
    grid = [(one, method) for one in settings for method in methods]
    rows: dict[int, dict[str, object]] = {}
    where = everyone[0].store.root
    with progress(len(clients) + len(grid), "clients and runs", "part") as bar:
        for _ in parallel(partial(_train_apart, where), list(clients)):
            bar.update(1)
        for index, row in parallel(partial(_run_apart, where), grid):
            rows[index] = row
            bar.update(1)
            if out:
                write_table(pd.DataFrame([rows[i] for i in sorted(rows)]), out)
    return pd.DataFrame([rows[i] for i in range(len(grid))])


def _train_apart(store: Path, part: tuple[Settings, int]) -> None:
    settings, client = part
    Experiment(settings, store).train(client)


def _run_apart(store: Path, part: tuple[Settings, str]) -> dict[str, object]:
    settings, method = part
    return row_of(Experiment(settings, store).result(method))


def row_of(result: Result) -> dict[str, object]:
    """One row of the table: what was run, how accurate, and its account.

    The clients' seconds are of all of them together, one after the other; the server's of all its stages.
    """
    clients = result.seconds.get("clients", 0.0)
    seconds = {"client_seconds": clients, "server_seconds": sum(result.seconds.values()) - clients}
    return {name: getattr(result, name) for name in COLUMNS + ACCOUNT} | seconds


def write_table(table: pd.DataFrame, out: Path) -> None:
    """The CSV of runs, and its times beside it."""
    write_csv(table[[*COLUMNS, *ACCOUNT]], out, digits=6)
    write_csv(table[["method", "seed", *SECONDS]], seconds_file(out), digits=3)


def seconds_file(out: Path) -> Path:
    """Where the times of `out` lie: apart, so that the results of a run are the same bytes every time."""
    return out.with_name(f"{out.stem}_seconds{out.suffix}")
