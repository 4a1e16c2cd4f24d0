"""Write the README's results: accuracies from results/{comparison,skews}.csv, times from the run store.

python tools/readme.py            run by `make results`, after `fedmitr compare` and `make reproduce`
"""

import json
import os
import platform
import re
from pathlib import Path

import nbformat
import pandas as pd

from fedmitr.core.machine import native_bf16
from fedmitr.core.paths import default_store, home
from fedmitr.experiments.compare import seconds_file
from fedmitr.experiments.differences import (
    GAP,
    HALF,
    LABEL,
    REFERENCE,
    account_table,
    summarise,
)
from fedmitr.methods import described, in_order
from fedmitr.settings import Settings
from fedmitr.study.tables import markdown

RESULTS = home() / "results" / "comparison.csv"
SKEWS = home() / "results" / "skews.csv"
START, END = "<!-- results: ", "<!-- /results -->"
COSTS = ["exchanges", "MB up", "server seconds"]


def accuracy_table(runs: pd.DataFrame, seconds: pd.DataFrame, skews: pd.DataFrame) -> str:
    """Accuracy over seeds, the paired difference to FedMITR+, what a run costs, accuracy at other skews."""
    table = account_table(runs, seconds)[["accuracy", f"{GAP} [95 %]", *COSTS]]
    for alpha in sorted(set(skews["alpha"]) - set(runs["alpha"])):
        scores = summarise(skews[skews["alpha"] == alpha]).reindex(in_order(runs["method"]))
        cells = [f"{mean:.3f} ± {std:.3f}" for mean, std in scores[["mean", "std"]].to_numpy()]
        table[f"α = {alpha:g}"] = cells
    return markdown(table)


def verdict(runs: pd.DataFrame) -> str:
    """Which methods the seeds put above and below FedMITR+, and which they do not tell apart from it."""
    table = summarise(runs)
    if REFERENCE not in table.index:
        return f"There is no run of {LABEL} to compare with."
    table = table[[name != REFERENCE and not described(name).is_reference for name in table.index]]
    parts = {
        "above zero for": table[GAP] > table[HALF],
        "below zero for": -table[GAP] > table[HALF],
        "on both sides of it for": table[GAP].abs() <= table[HALF],
    }
    told = {what: ", ".join(described(n).label for n in table[rows].index) for what, rows in parts.items()}
    said = "; ".join(f"{what} {names or 'none'}" for what, names in told.items())
    return f"The interval of the difference to {LABEL} lies {said} ({len(table)} intervals at once)."


def times(store: Path, executed: Path) -> str:
    """Mean seconds of each stage over the stored runs, and of the last `make reproduce`."""
    runs = [json.loads(p.read_text()) for p in store.glob("runs/*/result.json")]
    usual = Settings.load("laptop").model_dump(mode="json") | {"seed": 0}
    runs = [r for r in runs if r["settings"] | {"seed": 0} == usual]  # others are of sweeps and notebooks
    seconds = pd.DataFrame([r["seconds"] for r in runs if r["method"] in (REFERENCE, "central")]).mean()
    stages = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    books = [nbformat.read(p, as_version=4) for p in sorted(executed.glob("*.ipynb"))]
    total = sum(b.metadata["papermill"]["duration"] for b in books)
    products = "bfloat16" if native_bf16() else "float32"
    machine = (
        f"{os.cpu_count()} cores ({platform.machine()}, {platform.system()}), no GPU, {products} products"
    )
    return (
        f"Measured on {machine}, in seconds of one process with one thread. One run of {LABEL}, and central "
        f"training: {stages}. `make reproduce`, {len(books)} notebooks from an empty store, after set-up: "
        f"{total / 60:.1f} minutes."
    )


def fill(readme: str, text: str) -> str:
    """The README with the part between the markers replaced."""
    pattern = re.compile(rf"({re.escape(START)}[^\n]*\n).*?({re.escape(END)})", re.S)
    return pattern.sub(lambda m: m[1] + text + "\n" + m[2], readme)


def caption(runs: pd.DataFrame, skews: pd.DataFrame) -> str:
    """Which runs the table shows, and what its columns are."""
    (seeds, others), first = (sorted(part["seed"].unique()) for part in (runs, skews)), runs.iloc[0]
    return (
        f"Task `{first['task']}`, {first['clients']} clients, Dirichlet α = {first['alpha']}, profile "
        f"laptop, seeds {seeds[0]} to {seeds[-1]} (other α: {others[0]} to {others[-1]}). Test "
        "accuracy, mean ± std over seeds; MB of all clients together; \\* runs several models at every "
        "prediction."
    )


def main() -> None:
    runs, seconds, skews = (pd.read_csv(path) for path in (RESULTS, seconds_file(RESULTS), SKEWS))
    measured = times(default_store(), home() / "reproduced" / "laptop" / "notebooks")
    readme = home() / "README.md"
    parts = caption(runs, skews), accuracy_table(runs, seconds, skews), verdict(runs), measured
    readme.write_text(fill(readme.read_text(), "\n\n".join(parts)))


if __name__ == "__main__":
    main()
