"""Several methods on the same clients over several seeds, and what that says."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from scipy import stats
from tqdm.auto import tqdm

from .experiment import run
from .settings import Settings
from .store import check_writable, write_csv

COLUMNS = ("method", "task", "alpha", "clients", "seed", "accuracy")
REFERENCE = "fedmitr"


def compare(
    methods: Sequence[str],
    settings: Sequence[Settings],
    store: Path | str | None = None,
    out: Path | None = None,
) -> pd.DataFrame:
    """One row per method and setting; finished runs come from the store. Rewrites `out` after every run."""
    if out:
        check_writable(out.parent, f"out={str(out)!r}")
    rows = []
    grid = [(s, m) for s in settings for m in methods]
    for one, method in tqdm(grid, desc="runs", unit="run"):
        result = run(method, one, store)
        rows.append({name: getattr(result, name) for name in COLUMNS})
        if out:
            write_csv(pd.DataFrame(rows), out, digits=6)
    return pd.DataFrame(rows)


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Per method: mean and std of accuracy over seeds, and the paired difference to FedMITR.

    The difference is this method minus FedMITR on the same seeds, with the half width of its 95 %
    interval from Student's t; NaN where there is no FedMITR run or only one seed.
    """
    wide = runs.pivot_table(index="seed", columns="method", values="accuracy")
    rows = []
    for method in dict.fromkeys(runs["method"]):
        row = {"method": method, "seeds": len(wide), "mean": wide[method].mean(), "std": wide[method].std()}
        difference = wide[method] - wide[REFERENCE] if REFERENCE in wide else wide[method] * float("nan")
        width = difference.std() / len(wide) ** 0.5 * stats.t.ppf(0.975, max(1, len(wide) - 1))
        rows.append(row | {"minus fedmitr": difference.mean(), "± 95 %": width})
    return pd.DataFrame(rows).set_index("method")
