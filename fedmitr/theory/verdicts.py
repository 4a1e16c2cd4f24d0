"""Each step of the theory's argument, judged by the stored tables: paired over seeds, with Holm's procedure.

The argument: sparse inversion and token relabel lower the gradient's variance; less variance makes SGD more
stable; a stable student's loss on images it has not seen is close to that on those it has; so it is better.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..study.analysis import differences
from ..study.verdicts import FAILS, HOLDS, OPEN
from .experiment import INVERSIONS, LABELS
from .patches import GROUPS
from .stability import predicted_distance, slope

PARTS = ["start", "seed", "inversion", "labels", "images", "optimizer"]  # what names one student
CARD = ("step", "claim", "compared", "difference", "verdict")
LESS_NOISE = [
    *((f"dense · {labels}", f"sparse · {labels}") for labels in LABELS),
    *((f"{inversion} · pseudo-label tokens", f"{inversion} · relabel") for inversion in INVERSIONS),
    ("dense · distillation", "sparse · relabel"),
]  # what the theory says to have more variance, and what less


class Step(NamedTuple):
    """A step of the argument: a claim that the first of each pair of columns is above the second.

    scores: a row a seed; ratio: whether they are logarithms, so that differences are shown as ratios.
    """

    name: str
    claim: str
    scores: pd.DataFrame
    pairs: Sequence[tuple[str, str]]
    ratio: bool


def with_bounds(students: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of SGD's students with two bounds on `distance` from their measured variance.

    "convex": as if a step moved no two students apart; "smooth": with the measured curvature. "convex_loss"
    is the first times the gradient's length, the root of E‖g‖² = signal + variance: to first order a bound on
    `loss_distance`. The columns of students are those of results/theory.csv.
    """
    parts = []
    for _, run in students[students["optimizer"] == "sgd"].groupby(PARTS, sort=False):
        run = run.sort_values("step")
        known = run["step"], run["variance"], run["images"].iloc[0], run["rate"].iloc[0]
        smooth = predicted_distance(*map(_plain, known), curvature=run["curvature"].to_numpy())
        convex = predicted_distance(*map(_plain, known))
        length = np.sqrt(run["signal"].clip(lower=0) + run["variance"])
        parts.append(run.assign(convex=convex, smooth=smooth, convex_loss=convex * length))
    return pd.concat(parts)


def _plain(values: pd.Series | float) -> np.ndarray | float:
    return values.to_numpy() if isinstance(values, pd.Series) else values


def slopes(students: pd.DataFrame) -> pd.DataFrame:
    """Return how ‖θ − θ'‖ grows with SGD's steps t, ∝ t^s: measured and of both bounds, means over seeds.

    A row for each start and cell, with the last distance as a share of the convex bound (order).
    """
    rows = []
    for names, run in with_bounds(students).groupby(PARTS, sort=False):
        found = {name: slope(run["step"], run[name]) for name in ("distance", "convex", "smooth")}
        last = run.iloc[-1]
        rows.append(
            dict(zip(PARTS, names, strict=True)) | found | {"order": last["distance"] / last["convex"]}
        )
    table = pd.DataFrame(rows).assign(cell=lambda t: t["inversion"] + " · " + t["labels"])
    return table.groupby(["start", "cell", "images"], sort=False)[
        ["distance", "convex", "smooth", "order"]
    ].mean()


def card(
    students: pd.DataFrame, inversions: pd.DataFrame, start: str, optimizer: str = "sgd", level: float = 0.05
) -> pd.DataFrame:
    """Return the verdict card of one start, columns `CARD`: a row for each comparison of each step.

    students, inversions: the tables of `theory.experiment.theory`. The comparisons of a step are one family
    of Holm's procedure; the interval in brackets is the one that it tested.
    """
    rows = []
    for step in _steps(students, inversions, start, optimizer):
        scores = step.scores.dropna(axis=1, how="all")  # AdamW's students have no twins to be compared with
        pairs = [pair for pair in step.pairs if set(pair) <= set(scores)]
        if not pairs:
            continue
        found = differences(scores, pairs, level)
        for (more, less), row in found.iterrows():
            low, high = row["low Holm"], row["high Holm"]
            said = _said(row["difference"], low, high, step.ratio)
            rows.append((step.name, step.claim, f"{more} against {less}", said, judge(low, high)))
    return pd.DataFrame(rows, columns=list(CARD))


def judge(low: float, high: float) -> str:
    """Return the verdict on the claim that a difference is positive, from its interval [low, high]."""
    return HOLDS if low > 0 else FAILS if high < 0 else OPEN


def _said(mean: float, low: float, high: float, ratio: bool) -> str:
    if ratio:
        mean, low, high = np.exp([mean, low, high])
        return f"× {mean:.3g} [{low:.3g}, {high:.3g}]"
    return f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]"


def _steps(students: pd.DataFrame, inversions: pd.DataFrame, start: str, optimizer: str) -> list[Step]:
    """List the steps of the argument with what was measured for each."""
    at = students[(students["start"] == start) & (students["optimizer"] == optimizer)]
    at = at.assign(cell=at["inversion"] + " · " + at["labels"])
    full = at[at["images"] == at["images"].max()]
    last = full[full["step"] == full["step"].max()]
    noise = full.assign(value=np.log(full["variance"])).groupby(["seed", "cell"])["value"].mean().unstack()
    relative = np.log(full["variance"] / (full["signal"].clip(lower=0) + full["variance"]))
    relative = full.assign(value=relative).groupby(["seed", "cell"])["value"].mean().unstack()
    seen, unseen = last["held_out_kd"] - last["train_kd"], last["test_kd"] - last["held_out_kd"]
    both = {f"{cell}, synthetic": _wide(last, seen)[cell] for cell in last["cell"].unique()}
    both |= {f"{cell}, to real images": _wide(last, unseen)[cell] for cell in last["cell"].unique()}
    gaps = [(f"{c}, synthetic", f"{c}, to real images") for c in last["cell"].unique()]
    worst = _wide(last, np.log(last["loss_distance_max"]))
    accurate = [(less, more) for more, less in LESS_NOISE]
    steps = [
        Step("1 variance", "less gradient variance", noise, LESS_NOISE, True),
        Step("1 variance", "less variance for its gradient's length", relative, LESS_NOISE, True),
        *_patch_steps(inversions[inversions["start"] == start]),
        Step("3 stability", "closer students", _wide(last, np.log(last["distance"])), LESS_NOISE, True),
        Step("3 stability", "closer losses", _wide(last, np.log(last["loss_distance"])), LESS_NOISE, True),
        Step("3 stability", "closer losses at the worst image", worst, LESS_NOISE, True),
        Step("4 generalisation", "a smaller gap on synthetic images", _wide(last, seen), LESS_NOISE, False),
        Step("4 generalisation", "the synthetic gap is the larger", pd.DataFrame(both), gaps, False),
        Step("5 accuracy", "more accurate on real images", _wide(last, last["accuracy"]), accurate, False),
    ]
    return steps + (_bound_steps(at) if optimizer == "sgd" else [])


def _wide(rows: pd.DataFrame, values: pd.Series) -> pd.DataFrame:
    """Return values of rows as a table, a row a seed, a column a cell."""
    return rows.assign(value=values).pivot(index="seed", columns="cell", values="value")


def _patch_steps(inversions: pd.DataFrame) -> list[Step]:
    """List what is said of the background's gradient, while both kinds of patches are live."""
    steps = []
    for inversion, rows in inversions.groupby("inversion", sort=False):
        live = rows.pivot(
            index=["seed", "iteration"], columns="patches", values=["norm", "agreement"]
        ).dropna()
        for name, claim, ratio in (
            ("norm", f"{inversion}: surviving patches have the larger gradient", True),
            ("agreement", f"{inversion}: surviving patches' gradients keep their signs more", False),
        ):
            values = np.log(live[name]) if ratio else live[name]
            scores = values.groupby("seed").mean()
            steps.append(Step("2 background", claim, scores, [GROUPS], ratio))
    return steps


def _bound_steps(students: pd.DataFrame) -> list[Step]:
    """List what is said of the bound itself: that it holds, and that it is of order 1/n."""
    rows = with_bounds(students)
    rows = rows[rows["step"] == rows["step"].max()]
    full = rows[rows["images"] == rows["images"].max()]
    columns: Mapping[str, pd.DataFrame] = {
        name: _wide(full, np.log(full[name]))
        for name in ("convex", "smooth", "distance", "convex_loss", "loss_distance")
    }
    held = {f"{name} bound, {c}": columns[name][c] for name in ("convex", "smooth") for c in columns[name]}
    held |= {f"measured, {c}": columns["distance"][c] for c in columns["distance"]}
    pairs = [
        (f"{name} bound, {c}", f"measured, {c}") for name in ("convex", "smooth") for c in columns["distance"]
    ]
    losses = {f"bound, {c}": values for c, values in columns["convex_loss"].items()}
    losses |= {f"measured, {c}": values for c, values in columns["loss_distance"].items()}
    loss_pairs = [(f"bound, {c}", f"measured, {c}") for c in columns["loss_distance"]]
    few = rows[rows["images"] == rows["images"].min()]
    steps = [
        Step("3 stability", "the bound is above the distance", pd.DataFrame(held), pairs, True),
        Step(
            "3 stability", "the bound is above the losses' distance", pd.DataFrame(losses), loss_pairs, True
        ),
    ]
    if len(few) and few["images"].iloc[0] < full["images"].iloc[0]:
        cell = few["cell"].iloc[0]
        sizes = {f"{cell}, n = {part['images'].iloc[0]}": part for part in (few, full[full["cell"] == cell])}
        scores = {name: part.set_index("seed")["distance"].map(np.log) for name, part in sizes.items()}
        more = round(full["images"].iloc[0] / few["images"].iloc[0])
        claim = f"fewer images, less stable; of order 1/n: × {more}"
        steps.append(Step("3 stability", claim, pd.DataFrame(scores), [tuple(sizes)], True))
    return steps
