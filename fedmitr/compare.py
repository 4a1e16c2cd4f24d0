"""Several methods on the same clients over several seeds, and what that says."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from scipy import stats

from .experiment import Experiment, Result
from .methods import METHODS, Method
from .parallel import parallel
from .runtime import progress
from .settings import Settings
from .store import check_writable, write_csv

COLUMNS = ("method", "task", "alpha", "clients", "seed", "accuracy")
ACCOUNT = (
    "exchanges",
    "upload_bytes",
    "download_bytes",
    "synthetic_images",
    "student_steps",
    "inference_flops",
)
SECONDS = ("client_seconds", "server_seconds")
REFERENCE = "fedmitr"


def compare(
    methods: Sequence[str],
    settings: Sequence[Settings],
    store: Path | str | None = None,
    out: Path | None = None,
) -> pd.DataFrame:
    """One row per method and setting; finished runs come from the store.

    Rewrites the CSV `out`, and beside it the times (`seconds_file`), after every run.
    """
    if out:
        check_writable(out.parent, f"out={str(out)!r}")
    everyone = [Experiment(one, store) for one in settings]
    for experiment in everyone:  # all of them before the first is run
        experiment.check(methods)
    clients = {e.upload_key(k): (e.settings, k) for e in everyone for k in range(len(e.shards))}.values()
    grid = [(one, method, METHODS[method]) for one in settings for method in methods]
    rows: dict[int, dict[str, object]] = {}
    where = everyone[0].store.root
    with progress(len(clients) + len(grid), "clients and runs", "part") as bar:
        for _ in parallel(partial(_train_apart, where), list(clients)):
            bar.update(1)
        for index, row in parallel(partial(_run_apart, where), grid):
            rows[index] = row
            bar.update(1)
            if out:
                write_table(pd.DataFrame([rows[i] for i in sorted(rows)]), out)
    return pd.DataFrame([rows[i] for i in range(len(grid))])


def _train_apart(store: Path, part: tuple[Settings, int]) -> None:
    settings, client = part
    Experiment(settings, store).train(client)


def _run_apart(store: Path, part: tuple[Settings, str, Method]) -> dict[str, object]:
    settings, method, function = part
    METHODS[method] = function  # a worker does not know a method that was added by its user
    return row_of(Experiment(settings, store).result(method))


def row_of(result: Result) -> dict[str, object]:
    """One row of the table: what was run, how accurate, and its account.

    The clients' seconds are of all of them together, one after the other; the server's of all its stages.
    """
    clients = result.seconds.get("clients", 0.0)
    seconds = {"client_seconds": clients, "server_seconds": sum(result.seconds.values()) - clients}
    return {name: getattr(result, name) for name in COLUMNS + ACCOUNT} | seconds


def write_table(table: pd.DataFrame, out: Path) -> None:
    """The CSV of runs, and its times beside it."""
    write_csv(table[[*COLUMNS, *ACCOUNT]], out, digits=6)
    write_csv(table[["method", "seed", *SECONDS]], seconds_file(out), digits=3)


def seconds_file(out: Path) -> Path:
    """Where the times of `out` lie: apart, so that the results of a run are the same bytes every time."""
    return out.with_name(f"{out.stem}_seconds{out.suffix}")


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Per method, at one skew: mean and std of accuracy over seeds, and the paired difference to FedMITR.

    The difference is this method minus FedMITR on the same seeds, with the half width of its 95 %
    interval from Student's t; NaN where there is no FedMITR run or only one seed.
    """
    wide = runs.pivot_table(index="seed", columns="method", values="accuracy")
    rows = []
    for method in dict.fromkeys(runs["method"]):
        row = {"method": method, "seeds": len(wide), "mean": wide[method].mean(), "std": wide[method].std()}
        gap, half = paired(wide[method], wide[REFERENCE] if REFERENCE in wide else float("nan"))
        rows.append(row | {"minus fedmitr": gap, "± 95 %": half})
    return pd.DataFrame(rows).set_index("method")


def summarise_skews(runs: pd.DataFrame) -> pd.DataFrame:
    """`summarise` for each Dirichlet alpha by itself, indexed by alpha and method."""
    return pd.concat({alpha: summarise(some) for alpha, some in runs.groupby("alpha")}, names=["alpha"])


def across_skews(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per method and seed, its accuracy the mean over alphas; of seeds that ran at all of them."""
    complete = runs.groupby("seed")["alpha"].transform("nunique") == runs["alpha"].nunique()
    keys = ["method", "seed"]
    return runs[complete].groupby(keys, sort=False, as_index=False)["accuracy"].mean()


def skew_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Methods, best first, against alphas and the mean over them: mean ± std and `interval`, as text."""
    parts = {f"α = {alpha:g}": some for alpha, some in runs.groupby("alpha")}
    parts["mean over α"] = together = across_skews(runs)
    order = summarise(together).sort_values("mean", ascending=False).index
    text = {
        f"{name}, {some['seed'].nunique()} seeds": [
            f"{row['mean']:.3f} ± {row['std']:.3f}, {interval(row)}".removesuffix(", ")
            for _, row in summarise(some).loc[order].iterrows()
        ]
        for name, some in parts.items()
    }
    return pd.DataFrame(text, order)


def paired(one: pd.Series, other: pd.Series | float) -> tuple[float, float]:
    """Mean of one − other over shared seeds, and the half width of its 95 % interval (Student's t)."""
    gap = (one - other).dropna()
    return gap.mean(), gap.std() / max(1, len(gap)) ** 0.5 * stats.t.ppf(0.975, max(1, len(gap) - 1))


# The methods as papers spell them, in the order in which the comparison tells of them.
NAMES = {
    "fedavg": "FedAvg",
    "fdafl": "F-DAFL",
    "fadi": "F-ADI",
    "dense": "DENSE",
    "co_boosting": "Co-Boosting",
    "fedftg": "FedFTG",
    "fusefl": "FuseFL",
    "fedmitr": "FedMITR",
    "ensemble": "ensemble",
    "local": "local",
    "central": "central",
}
REFERENCES = ("ensemble", "local", "central")
SEVERAL = ("fusefl", "ensemble")  # not one model: every answer runs the blocks of all clients


def account_table(runs: pd.DataFrame, seconds: pd.DataFrame) -> pd.DataFrame:
    """What each method reaches and what it costs, as text: means over seeds, in the order of `NAMES`.

    runs and seconds are the two files that `compare` writes. A star marks what is not one model; the
    factor beside the operations of one answer is against the cheapest method.
    """
    scores = summarise(runs)
    costs = runs.groupby("method")[list(ACCOUNT)].mean()
    costs = costs.join(seconds.groupby("method")[list(SECONDS)].mean())
    rows, alone = {}, runs["seed"].nunique() == 1
    for method in [m for m in NAMES if m in costs.index]:
        score, cost = scores.loc[method], costs.loc[method]
        times = cost["inference_flops"] / costs["inference_flops"].min()
        rows[NAMES[method] + " *" * (method in SEVERAL)] = {
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
