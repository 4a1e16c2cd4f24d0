"""Verdicts: each claim of the protocol judged by the study's runs, by rules that were written before them.

A claim that one method is above another *holds* where the interval of the difference, adjusted for all
comparisons of the claim, lies above zero. It *fails* where the interval excludes even the smallest lead that
is worth a claim (`Protocol.size`). Else it is *not decided*, and the interval says how large the lead may be.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from ..core.store import write_json
from ..experiments.differences import REFERENCE
from ..methods import described, in_order
from .analysis import as_dict, differences, part_table, wide
from .protocol import Claim, Ground, Panel, Protocol

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
IMAGES = "synthetic images"


def judge(low: float, high: float, size: float) -> str:
    """Return the verdict on a lead whose adjusted interval is [low, high]."""
    if high - low < 1e-9:  # the same on every seed: nothing was tested
        return OPEN
    return HOLDS if low > 0 else FAILS if high < size else f"{OPEN}: could be as large as {high:+.3f}"


def rivals(names: list[str], but: str, images: bool = False) -> list[str]:
    """Return the methods that a one-shot method is to be above, in the order of tables.

    They take one exchange, leave one model and are no reference; images: and they make synthetic images.
    """
    records = [described(name) for name in in_order(names) if name != but]
    chosen = [r for r in records if r.single_model and r.exchanges == 1 and not r.is_reference]
    return [r.name for r in chosen if not images or r.family == IMAGES]


def verdicts(protocol: Protocol, runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each claim and part: what was compared, the decisive difference, and the verdict.

    runs: the study's table. A claim over several rivals holds where it holds against each of them, and fails
    where it fails against one; the row shows the rival that leaves the least lead, and the adjusted p-value
    against that one. A claim whose runs are missing is not tested.
    """
    rows = [_row(protocol, runs, claim, part) for claim in protocol.claims for part in claim.where]
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(protocol: Protocol, runs: pd.DataFrame, claim: Claim, part: str) -> dict[str, Any]:
    scores = wide(runs[runs["part"] == part])
    if isinstance(claim.than, str):
        names = protocol.methods_of(protocol.part(part))
        others = rivals(names, claim.better, images=claim.than == "images")
    else:
        others = list(claim.than)
    row = {"claim": claim.claim, "source": claim.source, "where": part}
    label = _labels(protocol.part(part))
    told = label(others[0]) if len(others) == 1 else f"each of {len(others)}"
    if not {claim.better, *others} <= set(scores.columns):
        return row | {"compared": f"{label(claim.better)} − {told}", "verdict": UNTESTED}
    table = differences(scores, [(claim.better, other) for other in others], protocol.level)
    said = [judge(low, high, protocol.size) for low, high in table[["low Holm", "high Holm"]].to_numpy()]
    least = table["high Holm"].argmin()
    found = table.iloc[least]
    if len(others) > 1:
        told += f", {said.count(HOLDS)} hold; least against {label(others[least])}"
    verdict = FAILS if FAILS in said else HOLDS if set(said) == {HOLDS} else said[least]
    if verdict == HOLDS and len(others) > 1:
        told = f"each of {len(others)}; least against {label(others[least])}"
    return row | {
        "compared": f"{label(claim.better)} − {told}",
        "difference": found["difference"],
        "low": found["low Holm"],
        "high": found["high Holm"],
        "p": found["p Holm"],
        "wins": int(found["wins"]),
        "seeds": int(found["seeds"]),
        "verdict": verdict,
    }


def _labels(part: Ground | Panel):
    """Return the function from a cell to its name in tables."""
    return (lambda name: name) if isinstance(part, Panel) else (lambda name: described(name).label)


def summary(protocol: Protocol, runs: pd.DataFrame) -> list[str]:
    """Write what the study says in five lines, on its primary grounds."""
    grounds = [name for name, ground in protocol.grounds.items() if ground.role == "primary"]
    tables = {name: part_table(protocol, runs, name) for name in grounds}
    return [
        _each(tables, "Highest mean of one model from one exchange", _best),
        _each(tables, "Other methods and FedMITR+", _counts),
        _each(tables, "Do images add to sums of features? FedMITR+ minus ridge+", _against("ridge_plus")),
        _each(tables, "FedMITR as published, minus FedMITR+", _against("fedmitr", turned=True)),
        "Claims of the papers and ours: " + _tally(verdicts(protocol, runs)) + ".",
    ]


def _each(tables: dict[str, pd.DataFrame], title: str, say) -> str:
    return f"{title}: " + "; ".join(f"{name}: {say(table)}" for name, table in tables.items()) + "."


def _best(table: pd.DataFrame) -> str:
    known = rivals(list(table.index), "")
    means = table.loc[known, "mean"].sort_values(ascending=False, kind="stable")
    return ", ".join(f"{described(name).label} {mean:.3f}" for name, mean in means.head(3).items())


def _counts(table: pd.DataFrame) -> str:
    some = table.loc[[m for m in table.index if m != REFERENCE and not described(m).is_reference]]
    below, above = (some["high Holm"] < 0).sum(), (some["low Holm"] > 0).sum()
    return f"{below} of {len(some)} below it, {above} above, {len(some) - below - above} not told apart"


def _against(other: str, turned: bool = False):
    """Return what says a method's difference to FedMITR+; FedMITR+ minus the method unless it is turned."""

    def say(table: pd.DataFrame) -> str:
        if other not in table.index:
            return "not run"
        row = table.loc[other]
        sign = 1 if turned else -1
        low, high = sorted((sign * row["low Holm"], sign * row["high Holm"]))
        return f"{sign * row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"

    return say


def _tally(card: pd.DataFrame) -> str:
    kinds = card["verdict"].str.split(":").str[0]
    return ", ".join(f"{(kinds == kind).sum()} {kind}" for kind in (HOLDS, FAILS, OPEN, UNTESTED))


def report(protocol: Protocol, runs: pd.DataFrame) -> dict[str, Any]:
    """Return all that is read from a study: every part's table, the verdicts, the five lines."""
    parts = {name: as_dict(part_table(protocol, runs, name)) for name in dict.fromkeys(runs["part"])}
    return {"parts": parts, "verdicts": as_dict(verdicts(protocol, runs)), "summary": summary(protocol, runs)}


def write_report(protocol: Protocol, runs: pd.DataFrame, path: Path) -> None:
    """Write `report` as JSON; times are rounded by the tables that they come from."""
    write_json(path, json.loads(json.dumps(report(protocol, runs))))
