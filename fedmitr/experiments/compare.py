"""Several methods on the same clients over several seeds: the table of runs."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from ..core.errors import BadInput
from ..core.paths import default_store
from ..core.processes import parallel
from ..core.progress import progress
from ..core.store import Store, check_output, write_csv
from ..methods import check_methods, find
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
Pair = tuple[str, Settings]  # a method, and the settings that it runs under


def compare(
    methods: Sequence[str],
    settings: Sequence[Settings],
    store: Path | str | None = None,
    out: Path | None = None,
) -> pd.DataFrame:
    """Run every method under every setting and return one row a run, as `run_all` does.

    The CSV `out`, and beside it the times (`seconds_file`), is rewritten after every run.
    """
    pairs = [(method, one) for one in settings for method in methods]
    return run_all(pairs, store, writer(out) if out else None)


def writer(out: Path) -> Callable[[pd.DataFrame], None]:
    """Return what writes a table of runs to a CSV; BadInput where that cannot be written."""
    check_output(out, f"out={str(out)!r}")
    return partial(write_table, out=out)


def run_all(
    pairs: Sequence[Pair],
    store: Path | str | None = None,
    save: Callable[[pd.DataFrame], None] | None = None,
) -> pd.DataFrame:
    """Run each method under its settings and return one row a run; finished runs come from the store.

    save is given the finished rows after every run, indexed by their places in `pairs`. Raises BadInput,
    before any work, for a method or a setting that cannot work.
    """
    kept = Store(store or default_store())
    train_clients(check_all(pairs, kept), kept)
    rows: dict[int, dict[str, object]] = {}
    with progress(len(pairs), "runs", "run") as bar:
        for index, row in parallel(partial(_run_in_worker, kept.root), pairs):
            rows[index] = row
            bar.update(1)
            if save:
                save(pd.DataFrame([rows[i] for i in sorted(rows)], index=sorted(rows)))
    return pd.DataFrame([rows[i] for i in range(len(pairs))])


def check_all(pairs: Sequence[Pair], store: Store) -> list[tuple[Settings, int]]:
    """Raise BadInput, before any work, for a run that cannot work; return the clients to train.

    They are those whose weights some method needs and the store lacks, each once. Runs with the same clients
    are checked together, so that their images are drawn once, and not kept.
    """
    groups: dict[tuple[object, ...], tuple[Settings, list[str]]] = {}
    for method, s in pairs:
        check_methods([method], s)
        same = s.seed, s.task, s.partition, s.model, s.client, s.fusefl
        groups.setdefault(same, (s, []))[1].append(method)
    todo: dict[str, tuple[Settings, int]] = {}
    for settings, methods in groups.values():
        experiment = Experiment(settings, store)
        experiment.check(methods)
        if any(find(method).needs_weights for method in methods):
            keys = {experiment.upload_key(k): (settings, k) for k in range(len(experiment.shards))}
            todo |= {key: client for key, client in keys.items() if not store.has("uploads", key)}
    return list(todo.values())


def train_clients(clients: Sequence[tuple[Settings, int]], store: Store) -> None:
    """Train these clients, side by side; what is left of an earlier run is not trained again."""
    if not clients:
        return
    with progress(len(clients), "clients", "client") as bar:
        for _ in parallel(partial(_train_in_worker, store.root), clients):
            bar.update(1)


def _train_in_worker(store: Path, item: tuple[Settings, int]) -> None:
    settings, client = item
    Experiment(settings, store).train(client)


def _run_in_worker(store: Path, pair: Pair) -> dict[str, object]:
    method, settings = pair
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
