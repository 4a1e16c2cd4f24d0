"""The papermill batch: every notebook in order, in a fresh kernel, at one profile."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from ..core.errors import BadInput
from ..core.paths import default_store, home, output_folder, shipped
from ..core.store import Store, write_csv
from ..settings import Settings
from .result import Result
from .run import Experiment

SUMMARY = "summary.csv"


def notebooks(only: str | None = None) -> list[Path]:
    """The numbered notebooks in order, or those whose numbers `only` lists."""
    found = {p.name[:2]: p for p in sorted(shipped("notebooks").glob("[0-9][0-9]_*.ipynb"))}
    chosen = [n.strip().zfill(2) for n in only.split(",")] if only else list(found)
    unknown = [n for n in chosen if n not in found]
    if unknown:
        raise BadInput(f"only={unknown[0]!r} is unknown: allowed are {', '.join(found)}")
    return [found[n] for n in chosen]


def reproduce(profile: str, only: str | None = None, store: Path | str | None = None) -> str:
    """Execute notebooks with papermill; returns the summary table as text.

    Every stage that an earlier run finished comes from the store, so a stopped run goes on where it
    was. Executed copies lie in notebooks/executed/PROFILE.
    """
    settings, chosen = Settings.load(profile), notebooks(only)
    store = Store(store or default_store())
    Experiment(settings, store).check()
    import papermill  # slow to import, and only this command needs it

    executed = home() / "notebooks" / "executed" / profile
    executed.mkdir(parents=True, exist_ok=True)
    for path in tqdm(chosen, desc=f"notebooks ({profile})", unit="nb"):
        papermill.execute_notebook(
            path,
            executed / path.name,
            parameters={"PROFILE": profile, "STORE": str(store.root.resolve())},
            cwd=path.parent,
            progress_bar={"desc": path.stem, "leave": False},
        )
    table = output_folder("results", profile) / SUMMARY
    return (
        pd.read_csv(table).to_string(index=False) if table.exists() else f"{len(chosen)} notebooks executed"
    )


def write_summary(results: Sequence[Result], profile: str) -> pd.DataFrame:
    """One row per run, as results/summary.csv too; no timings: the same runs give the same bytes."""
    columns = ("method", "task", "alpha", "clients", "seed", "accuracy", "upload_bytes")
    table = pd.DataFrame([{name: getattr(r, name) for name in columns} for r in results])
    write_csv(table, output_folder("results", profile) / SUMMARY, digits=4)
    return table
