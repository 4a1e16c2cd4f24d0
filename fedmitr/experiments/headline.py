"""Headline numbers: what notebooks state, recorded as they run, and compared with what the repository ships.

A notebook calls `record` for what it computes, never for what it reads from a stored table. In the end
`fedmitr reproduce` calls `compare_headline`: each number as stored, as measured now, and whether the
difference lies within the spread over seeds. results/headline.csv is made by `make publish`, which runs the
notebooks on several seeds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from ..core.paths import DEFAULT_PROFILE, output_folder, shipped
from ..core.store import write_csv

NUMBERS = "numbers.csv"  # what a run recorded: number, value
HEADLINE = "results/headline.csv"  # what ships: number, stored, spread
WITHIN = 2  # standard deviations over seeds: about 95 % of seeds


def record(numbers: Mapping[str, float], profile: str) -> None:
    """Record numbers by name in the run's results/numbers.csv; an existing name is replaced."""
    path = output_folder("results", profile) / NUMBERS
    known = read_numbers(path) if path.exists() else {}
    rows = {**known, **{name: round(float(value), 4) for name, value in numbers.items()}}
    write_csv(pd.DataFrame(sorted(rows.items()), columns=["number", "value"]), path, digits=4)


def read_numbers(path: Path) -> dict[str, float]:
    """Read what a run recorded: name -> value."""
    table = pd.read_csv(path)
    return dict(zip(table["number"], table["value"], strict=True))


def summarise_numbers(first: Mapping[str, float], others: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """Tabulate the numbers of a first seed with their standard deviation over all seeds.

    Columns number, stored, spread; a number that some seed lacks has no spread (NaN).
    """
    rows = []
    for name, value in sorted(first.items()):
        values = [value, *(other[name] for other in others if name in other)]
        complete = len(values) == 1 + len(others) > 1
        rows.append((name, value, pd.Series(values).std() if complete else float("nan")))
    return pd.DataFrame(rows, columns=["number", "stored", "spread"])


def compare_headline(profile: str, stored: pd.DataFrame | None = None) -> pd.DataFrame:
    """Compare the numbers of the last run of a profile with the stored ones.

    stored: a table as `summarise_numbers` makes it, by default the one that ships. Columns: stored; yours;
    "± over seeds", two standard deviations; "within?": "yes" or "no", "new" for a number that is not stored,
    "not run" for one that this run did not record, and empty for another profile than the stored one.
    """
    path = output_folder("results", profile) / NUMBERS
    yours = pd.Series(read_numbers(path) if path.exists() else {}, dtype=float)
    if stored is None:
        file = shipped(HEADLINE)
        stored = pd.read_csv(file) if file.exists() else summarise_numbers({}, [])
    table = stored.set_index("number").join(yours.rename("yours"), how="outer")
    table["± over seeds"] = WITHIN * table["spread"]
    table["within?"] = [_verdict(row) if profile == DEFAULT_PROFILE else "" for _, row in table.iterrows()]
    return table[["stored", "yours", "± over seeds", "within?"]]


def _verdict(row: pd.Series) -> str:
    if pd.isna(row["yours"]):
        return "not run"
    if pd.isna(row["stored"]):
        return "new"
    allowed = 0.0 if pd.isna(row["spread"]) else WITHIN * row["spread"]
    return "yes" if abs(row["yours"] - row["stored"]) <= allowed + 1e-4 else "no"


STORED = (
    "Tables over seeds in notebooks 05, 06, 07 and 09 show stored results: `make study`, "
    "`make transfer`, `make theory` and `make scale` run them again."
)


def headline_text(profile: str) -> str:
    """Write the comparison as text, with a line that says what it is."""
    table = compare_headline(profile)
    if profile == DEFAULT_PROFILE:
        ran = table[table["within?"].isin(["yes", "no"])]
        said = (
            f"{(ran['within?'] == 'yes').sum()} of {len(ran)} numbers that ran are within two standard "
            "deviations over seeds of the stored ones."
        )
    else:
        said = f"The stored numbers are of profile {DEFAULT_PROFILE}, yours of {profile}: not comparable."
    return f"{table.to_string(float_format=_number, na_rep='')}\n{said}\n{STORED}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.0f}"
