"""What the paper claims, and what the shipped results say of it: one row per claim."""

import pandas as pd

from ..methods import described
from .statistics import REFERENCE, across_skews, paired

HOLDS, FAILS, OPEN, UNTESTED = "holds", "does not hold", "not decided by these seeds", "not tested here"
COLUMNS = ("claim", "what was run", "result", "verdict")


def judge(low: float, high: float) -> str:
    """Whether a difference whose claimed sign is positive is one."""
    return HOLDS if low > 0 else FAILS if high < 0 else OPEN


def best_rival(runs: pd.DataFrame) -> str:
    """The single-model method, FedMITR aside, of the highest mean accuracy."""
    means = runs.groupby("method")["accuracy"].mean().drop(REFERENCE)
    records = {name: described(name) for name in means.index}
    return means[[r.single_model and not r.is_reference for r in records.values()]].idxmax()


def claims(runs: pd.DataFrame, cells: pd.DataFrame, skews: pd.DataFrame) -> pd.DataFrame:
    """The reproduction card, from the CSVs of `fedmitr compare` (one alpha), `sweep` and `compare` (several).

    Over several alphas, a seed's accuracy is its mean over them.
    """
    of = runs.pivot(index="seed", columns="method", values="accuracy")
    grid = cells[cells["panel"] == "components"].pivot(index="seed", columns="cell", values="accuracy")
    default, rival = "sparse · relabel", best_rival(runs)
    seeds = f"{len(of)} seeds, α = {runs['alpha'].iloc[0]:g}"
    pooled = across_skews(skews).pivot(index="seed", columns="method", values="accuracy")
    across = f"{len(pooled)} seeds, mean over α = " + ", ".join(f"{a:g}" for a in skews["alpha"].unique())
    rival_across = best_rival(across_skews(skews))
    few = f"{len(grid)} seeds, components"
    label, label_across = described(rival).label, described(rival_across).label
    differences = {
        "The best single global model of one-shot federated learning under label skew": (
            of[REFERENCE], of[rival], f"FedMITR − {label}, the best other single model", seeds
        ),
        "The same over several skews": (
            pooled[REFERENCE], pooled[rival_across], f"FedMITR − {label_across}, as above", across
        ),
        "One model replaces the ensemble of all uploads": (
            of[REFERENCE], of["ensemble"], "FedMITR − ensemble", seeds
        ),
        "It does over several skews": (
            pooled[REFERENCE], pooled["ensemble"], "FedMITR − ensemble", across
        ),
        "Synthetic images lift the averaged model": (of[REFERENCE], of["fedavg"], "FedMITR − FedAvg", seeds),
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
    for claim, (one, other, what, where) in differences.items():
        mean, half = paired(one, other)
        low, high = mean - half, mean + half
        result = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows.append((claim, f"{what}; {where}", result, judge(low, high)))
    rows.append(("Less gradient variance, a tighter stability bound", "", "", UNTESTED))
    return pd.DataFrame(rows, columns=COLUMNS)
