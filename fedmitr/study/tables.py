"""The study's tables as text: accuracy and differences by ground, costs, cells of panels, verdicts."""

from collections.abc import Mapping, Sequence

import pandas as pd

from ..experiments.differences import LABEL, by_family, span_text
from ..methods import Range, described, dotted, in_order
from ..settings import Settings, tuned_values

GAP = f"minus {LABEL} [adjusted interval]"
CARD = ["claim", "source", "where", "compared", "difference [adjusted interval]", "wins", "verdict"]


def accuracy_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return mean ± std, the difference with its adjusted interval, and on how many seeds it is above zero.

    table: what `analysis.part_table` returns for a ground or a panel; the text is empty for its reference.
    """
    text = pd.DataFrame(index=table.index)
    text["accuracy"] = [f"{m:.3f} ± {s:.3f}" for m, s in table[["mean", "std"]].to_numpy()]
    spans = table[["difference", "low Holm", "high Holm"]].to_numpy()
    text[GAP] = [span_text(*found) for found in spans]
    text["seeds above"] = [
        "" if pd.isna(wins) else f"{wins:.0f} of {n:.0f}" for wins, n in table[["wins", "seeds"]].to_numpy()
    ]
    return text


def cost_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return what methods cost as text: exchanges, models a prediction, MB, seconds of server and clients."""
    text = pd.DataFrame(index=table.index)
    text["exchanges"] = [f"{n:.0f}" for n in table["exchanges"]]
    text["models"] = ["1" if described(name).single_model else "K" for name in table.index]
    for title, column in {"MB up": "upload_bytes", "MB down": "download_bytes"}.items():
        text[title] = [f"{n / 1e6:.2f}" for n in table[column]]
    for title in ("server seconds", "client seconds"):
        text[title] = [f"{n:.1f}" for n in table[title.replace(" ", "_")]]
    return text


def ground_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a ground as text, family by family: accuracy, the difference to FedMITR+, and costs."""
    text = accuracy_columns(table).join(cost_columns(table))
    return text.set_axis(by_family(list(text.index)))


def grounds_table(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return several grounds side by side as text: accuracy and difference on each, costs of the first."""
    parts = []
    for ground, table in tables.items():
        text = accuracy_columns(table)[["accuracy", GAP]]
        parts.append(text.set_axis([ground, f"{ground}: {GAP}"], axis=1))
    costs = cost_columns(next(iter(tables.values())))[["exchanges", "MB up", "server seconds"]]
    text = pd.concat([*parts, costs], axis=1)
    return text.set_axis(by_family(list(text.index)))


def panel_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a panel as text: accuracy of each cell, and the difference to the first."""
    return accuracy_columns(table).rename(columns={GAP: "minus first [adjusted interval]"})


def panel_line(table: pd.DataFrame) -> str:
    """Say which cells of a panel are found above its first cell, which below, and which are not told apart.

    table: what `analysis.part_table` returns for a panel. A cell is found above or below where its adjusted
    interval excludes zero; the mean difference stands behind it.
    """
    first, rest = table.index[0], table.iloc[1:]
    above, below = rest["low Holm"] > 0, rest["high Holm"] < 0
    kinds = {"above it": above, "below it": below, "not told apart from it": ~(above | below)}
    told = [
        f"{kind}: {', '.join(f'{c} ({d:+.3f})' for c, d in rest.loc[where, 'difference'].items())}"
        for kind, where in kinds.items()
        if where.any()
    ]
    return f"“{first}” has {table.loc[first, 'mean']:.3f}. " + "; ".join(told) + "."


def verdict_table(card: pd.DataFrame) -> pd.DataFrame:
    """Return the verdicts as text, a row a claim and part, by claim and source."""
    text = card[["claim", "source", "where", "compared", "verdict"]].copy()
    text[CARD[4]] = [span_text(*found) for found in card[["difference", "low", "high"]].to_numpy(dtype=float)]
    counted = card[["wins", "seeds"]].to_numpy(dtype=float)
    text["wins"] = ["" if pd.isna(n) else f"{wins:.0f} of {n:.0f}" for wins, n in counted]
    return text[CARD]


def search_table(trials: pd.DataFrame, profile: str = "laptop") -> pd.DataFrame:
    """Return what tuning may try as text, a row a method and setting, and what won from each start.

    trials: what `tune.tune` returns. Methods that are tuned as another, or have nothing to try, have no row.
    """
    usual, rows = Settings.load(profile), []
    starts = list(dict.fromkeys(trials["start"]))
    for name in in_order(trials["method"]):
        for setting, allowed in described(name).search.items():
            tuned = [tuned_values(profile, start, name).get(setting, "") for start in starts]
            row = (described(name).label, setting, _allowed(allowed), dotted(usual, setting), *tuned)
            rows.append([*row[:2], *map(str, row[2:])])
    columns = ["method", "setting", "tried", "before", *(f"from {start}" for start in starts)]
    return pd.DataFrame(rows, columns=columns).set_index(["method", "setting"])


def _allowed(allowed: Range | Sequence[object]) -> str:
    if isinstance(allowed, Range):
        return f"{allowed.low:g} to {allowed.high:g}" + (", logarithmic" if allowed.log else "")
    return ", ".join(map(str, allowed))


def trials_table(trials: pd.DataFrame) -> pd.DataFrame:
    """Return how many trials each method had, how many ran on all seeds, and the first and best accuracy."""
    groups = trials.groupby(["start", "method"], sort=False)
    done = trials[trials["state"] == "complete"].groupby(["start", "method"], sort=False)["accuracy"]
    first = trials[trials["trial"] == 0].set_index(["start", "method"])["accuracy"]
    table = pd.DataFrame(
        {"trials": groups.size(), "on all seeds": done.size(), "first": first, "best": done.max()}
    )
    return table.rename(index=lambda name: described(name).label, level="method")


def markdown(table: pd.DataFrame) -> str:
    """Return a table of text in Markdown; what repeats in the first level of its index is left out."""
    names = [*table.index.names, *table.columns]
    lines = ["| " + " | ".join(map(str, names)) + " |", "|---" * len(names) + "|"]
    last = None
    for keys, row in zip(table.index, table.to_numpy(), strict=True):
        first, *others = keys if isinstance(keys, tuple) else (keys,)
        lines.append("| " + " | ".join(["" if first == last else first, *others, *row]) + " |")
        last = first
    return "\n".join(lines)
