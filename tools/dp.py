"""Write what protection costs into docs/scope.md and docs/privacy.md, from results/dp.csv.

python tools/dp.py            run by `make dp`
"""

import pandas as pd
from readme import fill

from fedmitr.core.paths import home
from fedmitr.methods import described
from fedmitr.study.tables import markdown

RUNS = home() / "results" / "dp.csv"
AT = 3.0  # the ε of the sentence in docs/scope.md


def cost_table(runs: pd.DataFrame) -> str:
    """Accuracy at each ε and without protection, a row for each start and method."""
    named = runs.assign(
        epsilon=[f"ε = {e:g}" if e == e else "no protection" for e in runs["epsilon"]],
        method=[described(name).label for name in runs["method"]],
    )
    groups = named.groupby(["start", "method", "epsilon"], sort=False)["accuracy"].agg(["mean", "std"])
    cells = groups.apply(lambda row: f"{row['mean']:.3f} ± {row['std']:.3f}", axis=1)
    wide = cells.unstack("epsilon").reindex(columns=list(dict.fromkeys(named["epsilon"])))
    wide = wide.reindex(pd.MultiIndex.from_frame(named[["start", "method"]].drop_duplicates()))
    return markdown(wide)


def sentence(runs: pd.DataFrame) -> str:
    """Accuracy of each method at ε = `AT` and without protection, from the first start."""
    start = runs["start"].iloc[0]
    runs = runs[runs["start"] == start]
    parts = []
    for method, own in runs.groupby("method", sort=False):
        plain = own[own["epsilon"].isna()]["accuracy"].mean()
        private = own[own["epsilon"] == AT]["accuracy"].mean()
        parts.append(f"{described(method).label} {private:.2f} ({plain:.2f} without)")
    return (
        f"Test accuracy at ε = {AT:g} and δ = {runs['delta'].iloc[0]:g} of each client's upload, start "
        f"`{start}`, mean of {runs['seed'].nunique()} seeds: {', '.join(parts)}."
    )


def main() -> None:
    runs = pd.read_csv(RUNS)
    for name, text in (("docs/scope.md", sentence(runs)), ("docs/privacy.md", cost_table(runs))):
        path = home() / name
        path.write_text(fill(path.read_text(), "dp", text))


if __name__ == "__main__":
    main()
