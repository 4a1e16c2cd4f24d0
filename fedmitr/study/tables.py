"""The study's tables as text: accuracy and differences by ground, costs, cells of panels, verdicts."""

from collections.abc import Mapping, Sequence

import pandas as pd

from ..experiments.differences import LABEL, by_family
from ..methods import described

GAP = f"minus {LABEL} [95 %, adjusted]"
CARD = ["claim", "source", "where", "compared", "difference [95 %, adjusted]", "wins", "verdict"]


def accuracy_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return mean ± std, the difference with its adjusted interval, and on how many seeds it is above zero.

    table: what `analysis.part_table` returns for a ground or a panel; the text is empty for its reference.
    """
    text = pd.DataFrame(index=table.index)
    text["accuracy"] = [f"{m:.3f} ± {s:.3f}" for m, s in table[["mean", "std"]].to_numpy()]
    spans = table[["difference", "low Holm", "high Holm"]].to_numpy()
    text[GAP] = [span(*found) for found in spans]
    text["seeds above"] = [
        "" if pd.isna(wins) else f"{wins:.0f} of {n:.0f}" for wins, n in table[["wins", "seeds"]].to_numpy()
    ]
    return text


def span(difference: float, low: float, high: float) -> str:
    """Return a difference and its interval as text; empty where there is none."""
    return "" if pd.isna(difference) else f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"


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
    return accuracy_columns(table).rename(columns={GAP: "minus first [95 %, adjusted]"})


def verdict_table(card: pd.DataFrame) -> pd.DataFrame:
    """Return the verdicts as text, a row a claim and part, by claim and source."""
    text = card[["claim", "source", "where", "compared", "verdict"]].copy()
    text[CARD[4]] = [span(*found) for found in card[["difference", "low", "high"]].to_numpy(dtype=float)]
    counted = card[["wins", "seeds"]].to_numpy(dtype=float)
    text["wins"] = ["" if pd.isna(n) else f"{wins:.0f} of {n:.0f}" for wins, n in counted]
    return text[CARD]


def markdown(table: pd.DataFrame, index: Sequence[str] = ()) -> str:
    """Return a table of text in Markdown; what repeats in the first level of its index is left out."""
    names = [*(index or table.index.names), *table.columns]
    lines = ["| " + " | ".join(map(str, names)) + " |", "|---" * len(names) + "|"]
    last = None
    for keys, row in zip(table.index, table.to_numpy(), strict=True):
        first, *others = keys if isinstance(keys, tuple) else (keys,)
        lines.append("| " + " | ".join(["" if first == last else first, *others, *row]) + " |")
        last = first
    return "\n".join(lines)
