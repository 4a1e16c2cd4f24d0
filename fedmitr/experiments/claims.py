"""The paper's claims, each judged by the shipped results: one row a claim.

Claims about the whole method are judged twice: for FedMITR as published, and for FedMITR+, which is ours.
"""

from collections.abc import Mapping

import pandas as pd

from ..methods import described
from .differences import REFERENCE, across_skews, paired

HOLDS, FAILS, OPEN, UNTESTED = "holds", "does not hold", "not decided by these seeds", "not tested here"
COLUMNS = ("claim", "what was run", "result", "verdict")
JUDGED = ("fedmitr", REFERENCE)
STARTS = {"fedmitr": "fedavg", REFERENCE: "ridge_plus"}  # what their students are before they learn
DEFAULT = "sparse · relabel"  # the first cell of the panel "components" of results/ablations.yaml
WHERE = "FedMITR+ from the clients' average, early start"
PARTS = {  # claims about parts: the cell against which the default stands, and what that compares
    "Sparse inversion is better than dense": (
        "dense · relabel", "sparse − dense, both relabelled, equal patch-steps"
    ),
    "Token relabel is better than pseudo-labels on all tokens": (
        "sparse · pseudo-label tokens", "relabel − pseudo-labels, both sparse"
    ),
    "Token relabel is better than no token labels": ("sparse · none", "relabel − none, both sparse"),
    "Sparse inversion and token relabel together are better than neither": (
        "dense · none", "sparse and relabel − dense and none"
    ),
}  # fmt: skip


def judge(low: float, high: float) -> str:
    """Return the verdict on a claim that a difference is positive, from its 95 % interval [low, high].

    An interval of no width comes from few seeds with the same difference, and decides nothing.
    """
    if high - low < 1e-9:
        return OPEN
    return HOLDS if low > 0 else FAILS if high < 0 else OPEN


def best_other(runs: pd.DataFrame) -> str | None:
    """Return the rival of FedMITR and FedMITR+ with the highest mean accuracy; None where there is none.

    A rival is no reference, takes one exchange and leaves one model.
    """
    means = runs.groupby("method")["accuracy"].mean().drop(list(JUDGED), errors="ignore")
    records = {name: described(name) for name in means.index}
    rivals = [r.single_model and not r.is_reference and r.exchanges == 1 for r in records.values()]
    return means[rivals].idxmax() if any(rivals) else None


def claims(runs: pd.DataFrame, cells: pd.DataFrame, skews: pd.DataFrame) -> pd.DataFrame:
    """Return the reproduction card: claim, what was run, the difference with its interval, verdict.

    runs: the CSV of `fedmitr compare` at one alpha; cells: that of `sweep` over results/ablations.yaml;
    skews: that of `compare` over several alphas, where a seed's accuracy is its mean over them. A claim whose
    runs are missing is not tested.
    """
    wide = runs.pivot(index="seed", columns="method", values="accuracy")
    pooled = across_skews(skews).pivot(index="seed", columns="method", values="accuracy")
    grid = cells[cells["panel"] == "components"].pivot(index="seed", columns="cell", values="accuracy")
    one_skew = f"α = {runs['alpha'].iloc[0]:g}"
    several = "mean over α = " + ", ".join(f"{a:g}" for a in skews["alpha"].unique())
    rows = []
    for claim, others in _whole(runs).items():
        rows += [_row(claim, wide, name, others[name], one_skew) for name in JUDGED]
    for claim, others in _whole(across_skews(skews)).items():
        rows += [_row(f"{claim}, over several skews", pooled, name, others[name], several) for name in JUDGED]
    for claim, (cell, what) in PARTS.items():
        rows.append(_row(claim, grid, DEFAULT, cell, WHERE, what))
    rows.append(("Less gradient variance, a tighter stability bound", "", "", UNTESTED))
    return pd.DataFrame(rows, columns=COLUMNS)


def _whole(runs: pd.DataFrame) -> Mapping[str, Mapping[str, str | None]]:
    """Return each claim about the whole method, with what FedMITR and FedMITR+ are measured against."""
    best = best_other(runs)
    return {
        "The best single global model of one-shot federated learning under label skew": dict.fromkeys(
            JUDGED, best
        ),
        "One model replaces the ensemble of all uploads": dict.fromkeys(JUDGED, "ensemble"),
        "Synthetic images lift the model that the student starts as": STARTS,
    }


def _row(
    claim: str, wide: pd.DataFrame, name: str, other: str | None, where: str, what: str | None = None
) -> tuple[str, str, str, str]:
    """Judge the claim that column `name` of wide is above column `other`, seed by seed."""
    what = what or f"{described(name).label} − {described(other).label if other else 'none'}"
    if not {name, other} <= set(wide.columns):
        return claim, what, "", UNTESTED
    both = wide[[name, other]].dropna()
    mean, half = paired(both[name], both[other])
    low, high = mean - half, mean + half
    said = f"{what}; {len(both)} seeds, {where}"
    return claim, said, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", judge(low, high)
