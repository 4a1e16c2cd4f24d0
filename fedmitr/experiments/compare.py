"""Several methods on the same clients over several seeds: the table of runs."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from ..core.errors import BadInput
from ..core.processes import parallel
from ..core.progress import progress
from ..core.store import check_output, write_csv
from ..methods import find
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
MOST_SEEDS = 10_000


def compare(
    methods: Sequence[str],
    settings: Sequence[Settings],
    store: Path | str | None = None,
    out: Path | None = None,
) -> pd.DataFrame:
    """Run every method under every setting and return one row a run; finished runs come from the store.

    Rewrites the CSV `out`, and beside it the times (`seconds_file`), after every run. Raises BadInput, before
    any work, for a method or a setting that cannot work.
    """
    if out:
        check_output(out, f"out={str(out)!r}")
    experiments = [Experiment(one, store) for one in settings]
    for experiment in experiments:  # all of them before the first is run
        experiment.check(methods)
    clients = {}
    if any(find(method).needs_weights for method in methods):
        clients = {e.upload_key(k): (e.settings, k) for e in experiments for k in range(len(e.shards))}
    clients = list(clients.values())
    grid = [(one, method) for one in settings for method in methods]
    rows: dict[int, dict[str, object]] = {}
    root = experiments[0].store.root
    with progress(len(clients) + len(grid), "clients and runs", "part") as bar:
        for _ in parallel(partial(_train_in_worker, root), clients):
            bar.update(1)
        for index, row in parallel(partial(_run_in_worker, root), grid):
            rows[index] = row
            bar.update(1)
            if out:
                write_table(pd.DataFrame([rows[i] for i in sorted(rows)]), out)
    return pd.DataFrame([rows[i] for i in range(len(grid))])


def _train_in_worker(store: Path, item: tuple[Settings, int]) -> None:
    settings, client = item
    Experiment(settings, store).train(client)


def _run_in_worker(store: Path, item: tuple[Settings, str]) -> dict[str, object]:
    settings, method = item
    return row_of(Experiment(settings, store).result(method))


def row_of(result: Result) -> dict[str, object]:
    """Return one row of the table: what was run, how accurate it is, and its account.

    client_seconds is the sum over clients, as if they trained one after the other; server_seconds the sum
    over the server's stages.
    """
    clients = result.seconds.get("clients", 0.0)
    seconds = {"client_seconds": clients, "server_seconds": sum(result.seconds.values()) - clients}
    return {name: getattr(result, name) for name in COLUMNS + ACCOUNT} | seconds


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Write the CSV of runs, and their times beside it."""
    write_csv(table[[*COLUMNS, *ACCOUNT]], out, digits=6)
    write_csv(table[["method", "seed", *SECONDS]], seconds_file(out), digits=3)


def seconds_file(out: Path) -> Path:
    """Return the path of the times of `out`: apart, so that a repeated run writes the same bytes to `out`."""
    return out.with_name(f"{out.stem}_seconds{out.suffix}")


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of `0-4`, `1,3,5` or a mix of both; BadInput for what cannot be read."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            span = range(int(first), int(last or first) + 1)
            seeds += span if len(span) <= MOST_SEEDS else []
    except ValueError:
        seeds = []
    if not seeds:
        raise BadInput(f"seeds={text!r} cannot be read: allowed are forms such as 0-4 or 1,3,5")
    return list(dict.fromkeys(seeds))
