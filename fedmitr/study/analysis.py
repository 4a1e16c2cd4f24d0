"""Paired differences over seeds, with intervals and p-values for one comparison and for all of a family.

A seed draws clients, scenes and everything random, and all methods run on the same ones; so accuracies are
compared seed by seed. The test is the paired t-test; where a family of differences is read together, Holm's
procedure keeps the chance of any false finding below the level (Holm 1979).
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from ..experiments.compare import ACCOUNT, SECONDS
from ..experiments.differences import REFERENCE
from ..methods import described, in_order
from .protocol import Panel, Protocol

DIFFERENCE = [
    "seeds", "difference", "low", "high", "p", "p Holm", "low Holm", "high Holm", "high all", "wins", "losses"
]  # fmt: skip


def differences(
    scores: pd.DataFrame, pairs: Sequence[tuple[str, str]], level: float = 0.05, lead: float = 0.0
) -> pd.DataFrame:
    """Test the mean differences of pairs of columns, as one family; return a row for each, as `DIFFERENCE`.

    scores: accuracy, a row a seed, a column a method or cell. A row has the mean of one − other over seeds
    that both have; its interval at `level` (Student's t); the two-sided p-value of a difference of `lead`,
    and Holm's; the interval at the level at which Holm's procedure tested it, which excludes `lead` exactly
    where the procedure rejects; the upper end of the interval that holds for all pairs together (Bonferroni);
    on how many seeds one is above and below the other. A difference of fewer than two seeds has no interval
    and p = 1; one that is the same on every seed has an interval of no width, and p = 0 unless it is `lead`.
    """
    gaps = [(scores[one] - scores[other]).dropna() for one, other in pairs]
    table = pd.DataFrame(
        {
            "seeds": [len(gap) for gap in gaps],
            "difference": [gap.mean() for gap in gaps],
            "wins": [int((gap > 0).sum()) for gap in gaps],
            "losses": [int((gap < 0).sum()) for gap in gaps],
        },
        index=pd.MultiIndex.from_tuples(pairs, names=["one", "other"]),
    )
    mean, count = table["difference"].to_numpy(), table["seeds"].to_numpy()
    error = np.array([gap.std() for gap in gaps]) / np.sqrt(np.maximum(count, 1))  # NaN for one seed
    error[error < 1e-12] = 0.0  # every seed agrees
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(np.abs(mean - lead) < 1e-12, 0.0, np.abs(mean - lead) / error)
    table["p"] = np.where(count < 2, 1.0, 2 * stats.t.sf(distance, np.maximum(count - 1, 1)))
    table["p Holm"] = holm_adjusted(table["p"])
    levels = {"": np.full(len(table), level), " Holm": holm_levels(table["p"], level)}
    levels[" all"] = np.full(len(table), level / len(table))
    for name, chosen in levels.items():
        half = stats.t.ppf(1 - chosen / 2, np.maximum(count - 1, 1)) * error
        table[f"low{name}"], table[f"high{name}"] = mean - half, mean + half
    return table[DIFFERENCE]


def holm_adjusted(p_values: Sequence[float]) -> np.ndarray:
    """Return Holm's adjusted p-values: the i-th smallest of m times m − i + 1, none below the one before.

    As statsmodels' `multipletests`, which collects the garbage of the whole process at every call.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    return adjusted


def holm_levels(p_values: Sequence[float], level: float) -> np.ndarray:
    """Return the level at which Holm's procedure tests each of m hypotheses.

    It tests the i-th smallest p-value at level / (m − i + 1) and stops at the first that it keeps. Those
    after that are kept, too, and get the level at which it stopped.
    """
    p = np.asarray(p_values, dtype=float)
    m, order = len(p), np.argsort(p, kind="stable")
    steps = level / (m - np.arange(m))
    kept = np.flatnonzero(p[order] > steps)
    if len(kept):
        steps[kept[0] :] = steps[kept[0]]
    levels = np.empty(m)
    levels[order] = steps
    return levels


def wide(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracies of a part of the study, a row a seed, a column a cell."""
    return runs.pivot(index="seed", columns="cell", values="accuracy")


def finished_parts(protocol: Protocol, runs: pd.DataFrame) -> list[str]:
    """List the parts of the protocol whose runs are all there, grounds first; `runs` may be unfinished."""
    there = runs["part"].value_counts()
    return [name for name in protocol.parts if there.get(name, 0) == protocol.runs_of(name)]


def part_table(protocol: Protocol, runs: pd.DataFrame, part: str) -> pd.DataFrame:
    """Return a row for each cell of a part: mean, std, the difference to the reference, and costs.

    Seconds are the least over seeds: other work of the machine can only add to them. Other costs are means.
    On a ground the difference is that to FedMITR+, on a panel that to its first cell; it is NaN where that
    one has no runs. References of a ground are no part of the family that Holm's procedure looks at, but a
    family of their own.
    """
    some, known = runs[runs["part"] == part], protocol.part(part)
    scores = wide(some)
    if isinstance(known, Panel):
        cells, first = [cell for cell in known.cells if cell in scores], next(iter(known.cells))
        families = [[cell for cell in cells if cell != first]]
    else:
        cells, first = in_order(scores.columns), REFERENCE
        others = [cell for cell in cells if cell != first]
        families = [[m for m in others if described(m).is_reference is apart] for apart in (False, True)]
    families = [family for family in families if family and first in scores]
    tested = [differences(scores, [(c, first) for c in family], protocol.level) for family in families]
    found = pd.concat(tested).droplevel("other") if tested else pd.DataFrame(columns=DIFFERENCE, dtype=float)
    table = found.reindex(cells)
    table.insert(0, "mean", scores.mean())
    table.insert(1, "std", scores.std())
    cells = some.groupby("cell")
    return table.join([cells[list(ACCOUNT)].mean(), cells[list(SECONDS)].min()]).rename_axis("cell")


def as_dict(table: pd.DataFrame) -> list[dict[str, object]]:
    """Return a table's rows with its index, for JSON: numbers with six digits, null for NaN."""
    return [
        {name: _plain(value) for name, value in row.items()} for row in table.reset_index().to_dict("records")
    ]


def _plain(value: object) -> object:
    if not isinstance(value, float | np.floating):
        return int(value) if isinstance(value, np.integer) else value
    return None if math.isnan(value) else int(value) if value.is_integer() else float(f"{value:.6g}")
