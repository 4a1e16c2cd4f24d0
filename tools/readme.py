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
from fedmitr.experiments.statistics import interval, skew_table, summarise
from fedmitr.settings import Settings

RESULTS = home() / "results" / "comparison.csv"
SKEWS = home() / "results" / "skews.csv"
START, END = "<!-- results: ", "<!-- /results -->"


def accuracy_table(runs: pd.DataFrame) -> str:
    """Mean ± std over seeds, and the paired difference to FedMITR, best first."""
    table = summarise(runs).sort_values("mean", ascending=False)
    lines = ["| method | test accuracy, mean ± std | minus FedMITR, mean [95 %] |", "|---|---|---|"]
    for method, row in table.iterrows():
        lines.append(f"| {method} | {row['mean']:.3f} ± {row['std']:.3f} | {interval(row)} |")
    return "\n".join(lines)


def skews_table(runs: pd.DataFrame) -> str:
    """`skew_table` in Markdown, under a line that says what it is."""
    table = skew_table(runs)
    lines = [
        f"The same at other skews, from seed {runs['seed'].min()} on: mean ± std, minus FedMITR [95 %].",
        "",
    ]
    lines += ["| method | " + " | ".join(table.columns) + " |", "|---" * (len(table.columns) + 1) + "|"]
    lines += [f"| {method} | " + " | ".join(row) + " |" for method, row in table.iterrows()]
    return "\n".join(lines)


def verdict(runs: pd.DataFrame) -> str:
    """Which methods the seeds tell apart from FedMITR, and which not."""
    table = summarise(runs).drop("fedmitr")
    unclear = table["minus fedmitr"].abs() <= table["± 95 %"]
    same, other = (", ".join(table[rows].index) or "none" for rows in (unclear, ~unclear))
    return f"These seeds do not tell FedMITR apart from {same}; they do from {other}."


def times(store: Path, executed: Path) -> str:
    """Mean seconds of each stage over the stored runs, of all runs, and of the last `make reproduce`."""
    runs = [json.loads(p.read_text()) for p in store.glob("runs/*/result.json")]
    usual = Settings.load("laptop").model_dump(mode="json") | {"seed": 0}
    runs = [r for r in runs if r["settings"] | {"seed": 0} == usual]  # others are of sweeps and notebooks
    seconds = pd.DataFrame([r["seconds"] for r in runs if r["method"] in ("fedmitr", "central")]).mean()
    stages = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    all_runs = pd.read_csv(seconds_file(RESULTS))
    clients = all_runs[all_runs["method"] == "fedmitr"]["client_seconds"].sum()
    clients += all_runs[all_runs["method"] == "fusefl"]["client_seconds"].sum()  # it trains them its own way
    together = clients + all_runs["server_seconds"].sum()
    books = [nbformat.read(p, as_version=4) for p in sorted(executed.glob("*.ipynb"))]
    total = sum(b.metadata["papermill"]["duration"] for b in books)
    products = "bfloat16" if native_bf16() else "float32"
    machine = (
        f"{os.cpu_count()} cores ({platform.machine()}, {platform.system()}), no GPU, {products} products"
    )
    return (
        f"Measured on {machine}, in seconds of one process with one thread. One run: {stages}. All runs of "
        f"this table: {together / 60:.0f} minutes of processing, spread over one process per core. "
        f"`make reproduce`, {len(books)} notebooks from an empty store, after set-up: "
        f"{total / 60:.1f} minutes."
    )


def fill(readme: str, text: str) -> str:
    """The README with the part between the markers replaced."""
    pattern = re.compile(rf"({re.escape(START)}[^\n]*\n).*?({re.escape(END)})", re.S)
    return pattern.sub(lambda m: m[1] + text + "\n" + m[2], readme)


def caption(runs: pd.DataFrame) -> str:
    """Which runs the table shows."""
    seeds, first = sorted(runs["seed"].unique()), runs.iloc[0]
    return (
        f"Task `{first['task']}`, {first['clients']} clients, Dirichlet α = {first['alpha']}, "
        f"profile laptop, {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}):"
    )


def main() -> None:
    runs = pd.read_csv(RESULTS)
    measured = times(default_store(), home() / "reproduced" / "laptop" / "notebooks")
    readme = home() / "README.md"
    skews = skews_table(pd.read_csv(SKEWS))
    text = f"{caption(runs)}\n\n{accuracy_table(runs)}\n\n{verdict(runs)}\n\n{skews}\n\n{measured}"
    readme.write_text(fill(readme.read_text(), text))


if __name__ == "__main__":
    main()
