"""The study: every run of the protocol, once; its table is what all verdicts are read from.

A stopped study goes on from its table and from the store. A part of it can be run again, to compare.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..core.errors import BadInput
from ..core.paths import default_store
from ..core.store import Store, check_output, digest, write_csv
from ..experiments.compare import ACCOUNT, SECONDS, run_all, seconds_file
from .protocol import Protocol, check_unchanged, flatten, planned

KEYS = ("part", "cell", "method", "seed")
COLUMNS = (*KEYS, "accuracy", *ACCOUNT, "settings")
TEXT = dict.fromkeys(("part", "cell", "method", "settings"), str)
READ = {"dtype": TEXT, "keep_default_na": False, "na_values": {name: [""] for name in ("accuracy", *SECONDS)}}


def study(protocol: Protocol, store: Path | str | None = None, out: Path | None = None) -> pd.DataFrame:
    """Run the protocol and return one row a run, written to the CSV `out` too, and its times beside it.

    Columns: `COLUMNS`, where settings is a hash of the run's, and `SECONDS`; numbers as they are read from
    `out`. Rows that `out` has are taken over, whichever machine made them. Raises BadInput, before any work,
    where settings are not the protocol's and where `out` has rows of another one.
    """
    check_unchanged(protocol)
    if out:
        check_output(out, f"out={str(out)!r}")
    kept = Store(store or default_store())
    plan = with_digests(protocol)
    there = read_study(out, plan) if out and out.exists() else pd.DataFrame(columns=[*COLUMNS, *SECONDS])
    todo = cell_by_cell(plan.drop(there.index))

    def whole(found: pd.DataFrame) -> pd.DataFrame:
        """Join the rows that are there already and those of finished runs, in the protocol's order."""
        ran = found.set_axis(todo.index[found.index])
        new = todo.join(ran[["accuracy", *ACCOUNT, *SECONDS]], how="inner")
        return pd.concat([part for part in (there, new) if len(part)])[[*COLUMNS, *SECONDS]].sort_index()

    def save(found: pd.DataFrame) -> None:
        write_study(whole(found), out)

    pairs = list(zip(todo["method"], todo["run under"], strict=True))
    runs = run_all(pairs, kept.root, save if out else None)
    return read_study(out, plan) if out else whole(runs)


def cell_by_cell(plan: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a plan part by part, and in a part cell by cell.

    On one seed several cells learn from the same images. In this order no two processes make the same images
    at the same time: one makes them, and the others find them in the store.
    """
    groups = plan.groupby(["part", "cell"], sort=False)
    parts = {name: place for place, name in enumerate(dict.fromkeys(plan["part"]))}
    ordered = sorted(groups, key=lambda group: parts[group[0][0]])  # stable: cells keep their order
    return pd.concat([some for _, some in ordered]) if ordered else plan


def finished(protocol: Protocol, out: Path) -> pd.DataFrame:
    """Return the rows of a study that are there, as `study` does; BadInput where they are of another one."""
    check_unchanged(protocol)
    return read_study(out, with_digests(protocol))


def rerun(
    protocol: Protocol,
    stored: pd.DataFrame,
    part: str,
    cells: Sequence[str] = (),
    seeds: Sequence[int] = (),
    store: Path | str | None = None,
) -> pd.DataFrame:
    """Run some rows of a study again; return their keys, the stored accuracy and the one of now.

    cells: methods of a ground, or cells of a panel; by default all, and all seeds. store: by default an empty
    one, so that everything is computed. Raises BadInput for what the protocol does not have.
    """
    check_unchanged(protocol)
    protocol.part(part)
    plan = planned(protocol)
    plan = plan[plan["part"] == part]
    for name, chosen, known in (("cell", cells, plan["cell"]), ("seed", seeds, plan["seed"])):
        if unknown := [one for one in chosen if one not in set(known)]:
            allowed = ", ".join(map(repr, dict.fromkeys(known)))
            raise BadInput(f"{name}={unknown[0]!r} is not run on {part!r}: allowed are {allowed}")
    plan = plan[plan["cell"].isin(cells or plan["cell"]) & plan["seed"].isin(seeds or plan["seed"])]
    with tempfile.TemporaryDirectory() as empty:
        runs = run_all(list(zip(plan["method"], plan["run under"], strict=True)), store or empty)
    table = plan[list(KEYS)].reset_index(drop=True).assign(now=runs["accuracy"].round(6))
    table = table.merge(stored[[*KEYS, "accuracy"]], on=list(KEYS), how="left")
    return table.rename(columns={"accuracy": "stored"})[[*KEYS, "stored", "now"]]


def with_digests(protocol: Protocol) -> pd.DataFrame:
    """Return every run of a protocol, as `planned`, with a hash of its settings, the same on every machine.

    Settings that did not exist when the protocol was frozen are left out of it: rows stay known.
    """
    plan = planned(protocol)
    digests = []
    for run in plan.itertuples(index=False):
        chosen = {name: v for name, v in flatten(run[-1]).items() if name in protocol.defaults}
        digests.append(digest("study", run.method, chosen))
    return plan.assign(settings=digests)


def write_study(table: pd.DataFrame, out: Path) -> None:
    """Write the times of a study, and then its CSV: rows that are there have theirs."""
    write_csv(table[[*KEYS, *SECONDS]], seconds_file(out), digits=3)
    write_csv(table[list(COLUMNS)], out, digits=6)


def read_study(path: Path, plan: pd.DataFrame | None = None) -> pd.DataFrame:
    """Read what `write_study` wrote; seconds are NaN where their file is gone.

    plan: what `with_digests` returns; the table is then indexed by the plan's rows. Raises BadInput where
    there is no such table, or one with rows that are not of the plan.
    """
    try:
        table = pd.read_csv(path, **READ)
        beside = seconds_file(path)
        seconds = pd.read_csv(beside, **READ) if beside.exists() else None
    except (OSError, ValueError) as error:
        raise BadInput(f"study={str(path)!r} cannot be read: `fedmitr study` writes it") from error
    if set(table.columns) != set(COLUMNS):
        raise BadInput(f"study={str(path)!r} is no table of a study: it has other columns")
    if seconds is None:
        seconds = table[list(KEYS)].assign(**dict.fromkeys(SECONDS, float("nan")))
    table = table.merge(seconds, on=list(KEYS), how="left")
    if plan is None:
        return table
    place = plan.reset_index(names="place")[["place", *KEYS, "settings"]]
    found = place.merge(table, on=[*KEYS, "settings"]).set_index("place").rename_axis(None).sort_index()
    if len(found) < len(table):
        others = len(table) - len(found)
        raise BadInput(f"study={str(path)!r} has {others} rows of another protocol: allowed is another --out")
    return found[[*COLUMNS, *SECONDS]]
