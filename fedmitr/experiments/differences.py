"""Accuracy over seeds: means, paired differences with intervals, and tables of them with costs."""

from collections.abc import Sequence

import pandas as pd
from scipy import stats

from ..methods import described, in_order
from .compare import ACCOUNT, SECONDS

REFERENCE = "fedmitr_plus"  # what every method is compared with
LABEL = described(REFERENCE).label
GAP, HALF = f"minus {LABEL}", "± 95 %"


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Return, for each method at one skew, its accuracy over seeds and the paired difference to FedMITR+.

    Columns: seeds, their number; mean and std of accuracy; `GAP`, the mean over shared seeds of this method
    minus FedMITR+; `HALF`, the half width of that mean's interval from Student's t. The last two are NaN
    without a run of FedMITR+, the last with one seed too.
    """
    wide = runs.pivot_table(index="seed", columns="method", values="accuracy")
    rows = []
    for method in dict.fromkeys(runs["method"]):
        row = {
            "method": method,
            "seeds": int(wide[method].count()),
            "mean": wide[method].mean(),
            "std": wide[method].std(),
        }
        gap, half = paired(wide[method], wide[REFERENCE] if REFERENCE in wide else float("nan"))
        rows.append(row | {GAP: gap, HALF: half})
    return pd.DataFrame(rows).set_index("method")


def summarise_skews(runs: pd.DataFrame) -> pd.DataFrame:
    """Return `summarise` of each Dirichlet alpha, indexed by alpha and method."""
    return pd.concat({alpha: summarise(some) for alpha, some in runs.groupby("alpha")}, names=["alpha"])


def by_family(methods: Sequence[str]) -> pd.MultiIndex:
    """Return an index of families and labels; a star marks a method that does not leave one model."""
    records = [described(method) for method in methods]
    names = [(r.family, r.label + " *" * (not r.single_model)) for r in records]
    return pd.MultiIndex.from_tuples(names, names=["family", "method"])


def paired(one: pd.Series, other: pd.Series | float) -> tuple[float, float]:
    """Return the mean of one − other over shared seeds and its 95 % interval's half width (Student's t)."""
    gap = (one - other).dropna()
    return gap.mean(), gap.std() / max(1, len(gap)) ** 0.5 * stats.t.ppf(0.975, max(1, len(gap) - 1))


def account_table(runs: pd.DataFrame, seconds: pd.DataFrame) -> pd.DataFrame:
    """Return each method's accuracy and costs as text: means over seeds, a row for each, as `by_family`.

    runs and seconds are the two files that `compare` writes. The factor beside the operations of one
    prediction is against the cheapest method.
    """
    scores = summarise(runs)
    costs = runs.groupby("method")[list(ACCOUNT)].mean()
    costs = costs.join(seconds.groupby("method")[list(SECONDS)].mean())
    rows, order, alone = [], in_order(costs.index), runs["seed"].nunique() == 1
    for method in order:
        score, cost = scores.loc[method], costs.loc[method]
        times = cost["inference_flops"] / costs["inference_flops"].min()
        row = {
            "accuracy": f"{score['mean']:.3f}" + ("" if alone else f" ± {score['std']:.3f}"),
            f"{GAP} [95 %]": interval(score),
            "exchanges": f"{cost['exchanges']:.0f}",
            "models a prediction": "1" if described(method).single_model else "K",
            "MB up": f"{cost['upload_bytes'] / 1e6:.2f}",
            "MB down": f"{cost['download_bytes'] / 1e6:.2f}",
            "server seconds": f"{cost['server_seconds']:.1f}",
            "client seconds": f"{cost['client_seconds']:.1f}",
            "synthetic images": f"{cost['synthetic_images']:.0f}",
            "student steps": f"{cost['student_steps']:.0f}",
            "MFLOP a prediction": f"{cost['inference_flops'] / 1e6:.0f}"
            + (f" ({times:.1f}×)" if times > 1.05 else ""),
        }
        rows.append(row)
    return pd.DataFrame(rows, index=by_family(order))


def interval(score: pd.Series) -> str:
    """Return a row of `summarise` as difference [low, high]; empty without an interval, and for FedMITR+."""
    gap, half = score[GAP], score[HALF]
    return "" if pd.isna(half) or gap == half == 0 else span_text(gap, gap - half, gap + half)


def span_text(difference: float, low: float, high: float) -> str:
    """Return a difference and its interval as text; empty where there is none."""
    return "" if pd.isna(difference) else f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
