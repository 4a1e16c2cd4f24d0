"""The paper's claims, each judged by the shipped results: one row a claim."""

import pandas as pd

from ..methods import described
from .statistics import REFERENCE, across_skews, paired

HOLDS, FAILS, OPEN, UNTESTED = "holds", "does not hold", "not decided by these seeds", "not tested here"
COLUMNS = ("claim", "what was run", "result", "verdict")


def judge(low: float, high: float) -> str:
    """Return the verdict on a claim that a difference is positive, from its 95 % interval [low, high]."""
    return HOLDS if low > 0 else FAILS if high < 0 else OPEN


def best_other(runs: pd.DataFrame) -> str:
    """Return the method, other than FedMITR, of the highest mean accuracy that leaves one model."""
    means = runs.groupby("method")["accuracy"].mean().drop(REFERENCE)
    records = {name: described(name) for name in means.index}
    return means[[r.single_model and not r.is_reference for r in records.values()]].idxmax()


def claims(runs: pd.DataFrame, cells: pd.DataFrame, skews: pd.DataFrame) -> pd.DataFrame:
    """Return the reproduction card: claim, what was run, the difference with its interval, verdict.

    runs: the CSV of `fedmitr compare` at one alpha; cells: that of `sweep`; skews: that of `compare` over
    several alphas, where a seed's accuracy is its mean over them.
    """
    wide = runs.pivot(index="seed", columns="method", values="accuracy")
    grid = cells[cells["panel"] == "components"].pivot(index="seed", columns="cell", values="accuracy")
    default, other = "sparse · relabel", best_other(runs)
    seeds = f"{len(wide)} seeds, α = {runs['alpha'].iloc[0]:g}"
    means = across_skews(skews)
    pooled = means.pivot(index="seed", columns="method", values="accuracy")
    across = f"{len(pooled)} seeds, mean over α = " + ", ".join(f"{a:g}" for a in skews["alpha"].unique())
    other_across = best_other(means)
    few = f"{len(grid)} seeds, components"
    label, label_across = described(other).label, described(other_across).label
    differences = {
        "The best single global model of one-shot federated learning under label skew": (
            wide[REFERENCE], wide[other], f"FedMITR − {label}, the best other single model", seeds
        ),
        "The same over several skews": (
            pooled[REFERENCE], pooled[other_across], f"FedMITR − {label_across}, as above", across
        ),
        "One model replaces the ensemble of all uploads": (
            wide[REFERENCE], wide["ensemble"], "FedMITR − ensemble", seeds
        ),
        "It does over several skews": (
            pooled[REFERENCE], pooled["ensemble"], "FedMITR − ensemble", across
        ),
        "Synthetic images lift the averaged model": (
            wide[REFERENCE], wide["fedavg"], "FedMITR − FedAvg", seeds
        ),
        "Sparse inversion is better than dense": (
            grid[default], grid["dense · relabel"], "sparse − dense, both relabelled, equal patch-steps", few
        ),
        "Token relabel is better than pseudo-labels on all tokens": (
            grid[default], grid["sparse · pseudo-label tokens"], "relabel − pseudo-labels, both sparse", few
        ),
        "Token relabel is better than no token labels": (
            grid[default], grid["sparse · none"], "relabel − none, both sparse", few
        ),
        "Sparse inversion and token relabel together are better than neither": (
            grid[default], grid["dense · none"], "sparse and relabel − dense and none", few
        ),
    }  # fmt: skip
    rows = []
    for claim, (one, against, what, where) in differences.items():
        mean, half = paired(one, against)
        low, high = mean - half, mean + half
        result = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows.append((claim, f"{what}; {where}", result, judge(low, high)))
    rows.append(("Less gradient variance, a tighter stability bound", "", "", UNTESTED))
    return pd.DataFrame(rows, columns=COLUMNS)
