"""Verdicts: each claim of the protocol judged by the study's runs, by rules that were written before them.

A claim that one method is above others *holds* where Holm's procedure, over all comparisons of the claim,
finds every lead above zero. It *fails* where the procedure finds some lead below the smallest one that is
worth a claim (`Protocol.size`). Else it is *not decided*, and says how large the lead may be: the upper end
of the interval that holds for all comparisons of the claim together. Both procedures err with a probability
of `Protocol.level` at most. A lead that is surely above zero holds, however small it is.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ..core.store import write_json
from ..experiments.compare import parse_seeds
from ..experiments.differences import REFERENCE
from ..methods import described
from .analysis import as_dict, differences, finished_parts, part_table, wide
from .protocol import Claim, Ground, Panel, Protocol, others_of, rivals

HOLDS, FAILS, OPEN, UNTESTED = "holds", "fails", "not decided", "not tested"
COLUMNS = [
    "claim",
    "source",
    "where",
    "compared",
    "difference",
    "low",
    "high",
    "p",
    "wins",
    "seeds",
    "verdict",
]


def verdicts(protocol: Protocol, runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each claim and part: what was compared, the decisive difference, and the verdict.

    runs: the study's table. A claim over several rivals holds where it holds against each of them, and fails
    where it fails against one. The row shows the rival that decides: of those that it fails against, else of
    those that are not decided, else of all, the one that leaves the least lead. A claim is not tested while
    some of its runs are missing.
    """
    rows = [_row(protocol, runs, claim, part) for claim in protocol.claims for part in claim.where]
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(protocol: Protocol, runs: pd.DataFrame, claim: Claim, part: str) -> dict[str, Any]:
    others, seeds = others_of(protocol, claim, part), parse_seeds(protocol.part(part).seeds)
    label = partial(_label, protocol.part(part))
    told = label(others[0]) if len(others) == 1 else f"each of {len(others)}"
    row = {"claim": claim.claim, "source": claim.source, "where": part}
    row["compared"] = f"{label(claim.better)} − {told}"
    scores = wide(runs[runs["part"] == part]).reindex(index=seeds, columns=[claim.better, *others])
    done = int(scores.notna().all(axis=1).sum())
    if done < len(seeds):
        return row | {"verdict": f"{UNTESTED}: {done} of {len(seeds)} seeds"}
    table, said = judged(scores, claim.better, others, protocol.level, protocol.size)
    verdict = next(kind for kind in (FAILS, OPEN, HOLDS) if kind in said)
    found = table[[one == verdict for one in said]].nsmallest(1, "high all").iloc[0]
    if len(others) > 1:
        row["compared"] += f" ({said.count(HOLDS)} hold); least lead: {label(found.name[1])}"
    if verdict == OPEN:
        verdict += f": could be as large as {table['high all'].min():+.3f}"
    columns = {"low": "low Holm", "high": "high Holm", "p": "p Holm"}
    row |= {name: found[columns.get(name, name)] for name in ("difference", "low", "high", "p")}
    return row | {"wins": int(found["wins"]), "seeds": len(seeds), "verdict": verdict}


def judged(
    scores: pd.DataFrame, better: str, others: Sequence[str], level: float, size: float
) -> tuple[pd.DataFrame, list[str]]:
    """Test the leads of a column over others; return the table of differences, and a verdict on each lead."""
    pairs = [(better, other) for other in others]
    table, least = (differences(scores, pairs, level, lead) for lead in (0.0, size))
    holds, fails = table["low Holm"] > 0, least["high Holm"] < size
    return table, [HOLDS if h else FAILS if f else OPEN for h, f in zip(holds, fails, strict=True)]


def _label(part: Ground | Panel, name: str) -> str:
    """Return the name of a method, or of a cell, as tables have it."""
    return name if isinstance(part, Panel) else described(name).label


def summary(protocol: Protocol, runs: pd.DataFrame) -> list[str]:
    """Write what the study says in five lines, on those of its primary grounds that are finished."""
    done = [n for n in finished_parts(protocol, runs) if n in protocol.primary]
    tables = {name: part_table(protocol, runs, name) for name in done}
    return [
        _each(tables, "Highest mean of one model from one exchange", _best),
        _each(tables, "Other methods and FedMITR+", _counts),
        _each(tables, "Do images add to sums? FedMITR+ minus ridge+", partial(_minus, "ridge_plus")),
        _each(tables, "FedMITR+ minus FedMITR, the paper's method", partial(_minus, "fedmitr")),
        "Claims of the papers and ours: " + _tally(verdicts(protocol, runs)) + ".",
    ]


def _each(tables: Mapping[str, pd.DataFrame], title: str, say: Callable[[pd.DataFrame], str]) -> str:
    told = "; ".join(f"{name}: {say(table)}" for name, table in tables.items())
    return f"{title}: {told or 'no primary ground is finished'}."


def _best(table: pd.DataFrame) -> str:
    known = rivals(list(table.index), "")
    means = table.loc[known, "mean"].sort_values(ascending=False, kind="stable")
    return ", ".join(f"{described(name).label} {mean:.3f}" for name, mean in means.head(3).items())


def _counts(table: pd.DataFrame) -> str:
    some = table.loc[[m for m in table.index if m != REFERENCE and not described(m).is_reference]]
    below, above = (some["high Holm"] < 0).sum(), (some["low Holm"] > 0).sum()
    return f"{below} of {len(some)} below it, {above} above, {len(some) - below - above} not told apart"


def _minus(other: str, table: pd.DataFrame) -> str:
    """Say the lead of FedMITR+ over another method, with the interval of the ground's table."""
    if other not in table.index or pd.isna(table.loc[other, "difference"]):
        return "not run"
    row = -table.loc[other, ["difference", "high Holm", "low Holm"]].astype(float)
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row)


def _tally(card: pd.DataFrame) -> str:
    kinds = card["verdict"].str.split(":").str[0]
    return ", ".join(f"{(kinds == kind).sum()} {kind}" for kind in (HOLDS, FAILS, OPEN, UNTESTED))


def report(protocol: Protocol, runs: pd.DataFrame) -> dict[str, Any]:
    """Return all that is read from a study: every part's table, the verdicts, the five lines."""
    parts = {name: as_dict(part_table(protocol, runs, name)) for name in dict.fromkeys(runs["part"])}
    return {"parts": parts, "verdicts": as_dict(verdicts(protocol, runs)), "summary": summary(protocol, runs)}


def write_report(protocol: Protocol, runs: pd.DataFrame, path: Path) -> None:
    """Write `report` as JSON."""
    write_json(path, report(protocol, runs))
