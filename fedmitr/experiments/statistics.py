"""What the runs of a comparison say: means over seeds, paired differences with intervals, accounts."""

import pandas as pd
from scipy import stats

from ..methods import described, in_order
from .compare import ACCOUNT, SECONDS

REFERENCE = "fedmitr"


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Per method, at one skew: mean and std of accuracy over seeds, and the paired difference to FedMITR.

    The difference is this method minus FedMITR on the same seeds, with the half width of its 95 %
    interval from Student's t; NaN where there is no FedMITR run or only one seed.
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
        rows.append(row | {"minus fedmitr": gap, "± 95 %": half})
    return pd.DataFrame(rows).set_index("method")


def summarise_skews(runs: pd.DataFrame) -> pd.DataFrame:
    """`summarise` for each Dirichlet alpha by itself, indexed by alpha and method."""
    return pd.concat({alpha: summarise(some) for alpha, some in runs.groupby("alpha")}, names=["alpha"])


def across_skews(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per method and seed, its accuracy the mean over alphas.

    A seed that a method did not run at every alpha is left out for that method: the mean of the other alphas
    would be another quantity.
    """
    keys = ["method", "seed"]
    complete = runs.groupby(keys)["alpha"].transform("nunique") == runs["alpha"].nunique()
    return runs[complete].groupby(keys, sort=False, as_index=False)["accuracy"].mean()


def skew_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Methods, best first, against alphas and the mean over them: mean ± std and `interval`, as text.

    A dash where a method has no run, or no seed that ran at every alpha; a number of seeds below that of the
    column is said in the cell.
    """
    parts = {f"α = {alpha:g}": some for alpha, some in runs.groupby("alpha")}
    parts["mean over α"] = together = across_skews(runs)
    best = (together if len(together) else runs).groupby("method")["accuracy"].mean()
    order = best.reindex(runs["method"].unique()).sort_values(ascending=False).index  # missing ones last
    text = {
        f"{name}, {some['seed'].nunique()} seeds": [_skew_cell(some, method) for method in order]
        for name, some in parts.items()
    }
    return pd.DataFrame(text, order)


def _skew_cell(runs: pd.DataFrame, method: str) -> str:
    if method not in set(runs["method"]):
        return "–"
    row, seeds = summarise(runs).loc[method], runs[runs["method"] == method]["seed"].nunique()
    text = f"{row['mean']:.3f} ± {row['std']:.3f}, {interval(row)}".removesuffix(", ")
    return text if seeds == runs["seed"].nunique() else f"{text} ({seeds} seeds)"


def paired(one: pd.Series, other: pd.Series | float) -> tuple[float, float]:
    """Mean of one − other over shared seeds, and the half width of its 95 % interval (Student's t)."""
    gap = (one - other).dropna()
    return gap.mean(), gap.std() / max(1, len(gap)) ** 0.5 * stats.t.ppf(0.975, max(1, len(gap) - 1))


def account_table(runs: pd.DataFrame, seconds: pd.DataFrame) -> pd.DataFrame:
    """What each method reaches and what it costs, as text: means over seeds, ordered by `methods.in_order`.

    runs and seconds are the two files that `compare` writes. A star marks what is not one model; the
    factor beside the operations of one answer is against the cheapest method.
    """
    scores = summarise(runs)
    costs = runs.groupby("method")[list(ACCOUNT)].mean()
    costs = costs.join(seconds.groupby("method")[list(SECONDS)].mean())
    rows, alone = {}, runs["seed"].nunique() == 1
    for method in in_order(costs.index):
        score, cost, record = scores.loc[method], costs.loc[method], described(method)
        times = cost["inference_flops"] / costs["inference_flops"].min()
        rows[record.label + " *" * (not record.single_model)] = {
            "accuracy": f"{score['mean']:.3f}" + ("" if alone else f" ± {score['std']:.3f}"),
            "minus FedMITR [95 %]": interval(score),
            "exchanges": f"{cost['exchanges']:.0f}",
            "MB up": f"{cost['upload_bytes'] / 1e6:.2f}",
            "MB down": f"{cost['download_bytes'] / 1e6:.2f}",
            "synthetic images": f"{cost['synthetic_images']:.0f}",
            "student steps": f"{cost['student_steps']:.0f}",
            "MFLOP an answer": f"{cost['inference_flops'] / 1e6:.0f}"
            + (f" ({times:.1f}×)" if times > 1.05 else ""),
            "server seconds": f"{cost['server_seconds']:.1f}",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def interval(score: pd.Series) -> str:
    """The paired difference of a row of `summarise` with its interval; empty without one, and for FedMITR."""
    gap, half = score["minus fedmitr"], score["± 95 %"]
    return "" if pd.isna(half) or gap == half == 0 else f"{gap:+.3f} [{gap - half:+.3f}, {gap + half:+.3f}]"
