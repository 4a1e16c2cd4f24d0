"""Paired differences over seeds, with intervals and p-values for one comparison and for all of a family.

A seed draws clients, scenes and everything random, and all methods run on the same ones; so accuracies are
compared seed by seed. The test is the paired t-test; where a family of differences is read together, Holm's
procedure keeps the chance of any false finding below the level (Holm 1979).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from ..experiments.compare import ACCOUNT, SECONDS
from ..experiments.differences import REFERENCE
from ..methods import described, in_order
from .protocol import Panel, Protocol

DIFFERENCE = ["seeds", "difference", "low", "high", "p", "p Holm", "low Holm", "high Holm", "wins", "losses"]


def differences(scores: pd.DataFrame, pairs: Sequence[tuple[str, str]], level: float = 0.05) -> pd.DataFrame:
    """Test the mean differences of pairs of columns, as one family; return a row for each, as `DIFFERENCE`.

    scores: accuracy, a row a seed, a column a method or cell. A row has the mean of one − other over seeds
    that both have; its interval at `level` (Student's t); the two-sided p-value, and Holm's; the interval at
    the level at which Holm's procedure tested it, which excludes zero exactly where the procedure rejects;
    on how many seeds one is above and below the other. A difference that is the same on every seed, or of
    one seed, is not tested: p = 1.
    """
    tests, rows = [], []
    for one, other in pairs:
        gap = (scores[one] - scores[other]).dropna()
        test = stats.ttest_1samp(gap, 0.0) if len(gap) > 1 and gap.std() > 1e-12 else None
        tests.append(test)
        row = {"seeds": len(gap), "difference": gap.mean(), "p": test.pvalue if test else 1.0}
        rows.append(row | {"wins": int((gap > 0).sum()), "losses": int((gap < 0).sum())})
    table = pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(pairs, names=["one", "other"]))
    table["p Holm"] = multipletests(table["p"], level, method="holm")[1]
    for name, levels in (("", np.full(len(table), level)), (" Holm", holm_levels(table["p"], level))):
        spans = [_interval(*found) for found in zip(tests, levels, table["difference"], strict=True)]
        table[f"low{name}"], table[f"high{name}"] = (np.array(spans).reshape(-1, 2)).T
    return table[DIFFERENCE]


def _interval(test, level: float, mean: float) -> tuple[float, float]:
    """Return the confidence interval at 1 − level; without a test, the mean alone."""
    return tuple(test.confidence_interval(1 - level)) if test else (mean, mean)


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


def part_table(protocol: Protocol, runs: pd.DataFrame, part: str) -> pd.DataFrame:
    """Return a row for each cell of a part: mean, std, the difference to the reference, and costs.

    On a ground the difference is that to FedMITR+, on a panel that to its first cell; references of a ground
    are no part of the family that Holm's procedure looks at, and have p-values of their own.
    """
    some, known = runs[runs["part"] == part], protocol.part(part)
    scores = wide(some)
    if isinstance(known, Panel):
        cells = [cell for cell in known.cells if cell in scores]
        first, families = cells[0], [cells[1:]]
    else:
        cells, first = in_order(scores.columns), REFERENCE
        others = [cell for cell in cells if cell != first]
        families = [[m for m in others if described(m).is_reference is apart] for apart in (False, True)]
    tested = [
        differences(scores, [(c, first) for c in family], protocol.level) for family in families if family
    ]
    table = pd.concat(tested).droplevel("other").reindex(cells)
    table.insert(0, "mean", scores.mean())
    table.insert(1, "std", scores.std())
    costs = some.groupby("cell")[[*ACCOUNT, *SECONDS]].mean()
    return table.join(costs).rename_axis("cell")


def as_dict(table: pd.DataFrame) -> list[Mapping[str, object]]:
    """Return a table's rows with its index, for JSON: NaN, which JSON lacks, becomes null."""
    plain = table.round(6).reset_index().astype(object)
    return plain.where(plain.notna(), None).to_dict("records")
