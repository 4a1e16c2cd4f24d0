"""A grid over settings: one method, many cells, several seeds each; ablations consist of such cells.

A cell is a name and the settings in which it differs from the profile; cells that belong together form
a panel. Runs that several cells share are run once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ..core.errors import BadInput
from ..core.store import check_output, write_csv
from ..settings import Settings, number
from .compare import COLUMNS, compare
from .differences import paired

Overrides = Mapping[str, Any]
KEPT = ("panel", "cell", *COLUMNS, "synthetic_images", "student_steps", "server_seconds")


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep: its panel, its name, and dotted settings with their values."""

    panel: str
    name: str
    overrides: Overrides


def read_cells(path: Path) -> list[Cell]:
    """Read the cells of a YAML file: panel -> cell -> {dotted name: value}; BadInput for anything else."""
    try:
        tree = yaml.safe_load(path.read_text())
        return [
            Cell(str(panel), str(name), {str(k): number(v) for k, v in (overrides or {}).items()})
            for panel, cells in tree.items()
            for name, overrides in cells.items()
        ]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise BadInput(f"cells={str(path)!r} is no YAML of panel: {{cell: {{setting: value}}}}") from error


def choose(cells: Sequence[Cell], panels: Sequence[str]) -> list[Cell]:
    """Return the cells of these panels; all cells where no panel is named."""
    known = list(dict.fromkeys(cell.panel for cell in cells))
    unknown = [panel for panel in panels if panel not in known]
    if unknown:
        raise BadInput(f"panel={unknown[0]!r} is unknown: allowed are {', '.join(known)}")
    return [cell for cell in cells if cell.panel in (panels or known)]


def grid_cells(texts: Sequence[str]) -> list[Cell]:
    """Return the product of `key=v1,v2` texts as one panel of cells; values are read as YAML."""
    axes = []
    for text in texts:
        key, equals, values = text.partition("=")
        try:
            found = yaml.safe_load(f"[{values}]") if equals and values.strip() else None
        except yaml.YAMLError:
            found = None
        if not found:
            raise BadInput(f"grid={text!r} is not of the form key=v1,v2")
        if key.strip() in (name for axis in axes for name, _ in axis):
            raise BadInput(f"grid={text!r}: {key.strip()!r} stands twice, allowed is once")
        axes.append([(key.strip(), number(value)) for value in found])
    return [Cell("grid", " ".join(f"{k}={v}" for k, v in chosen), dict(chosen)) for chosen in product(*axes)]


def check_cells(cells: Sequence[Cell]) -> None:
    """Raise BadInput for no cell, for two of one name in a panel, and for a cell that sets the seed."""
    if not cells:
        raise BadInput("there are no cells to run: give at least one")
    names = [(cell.panel, cell.name) for cell in cells]
    twice = [name for panel, name in names if names.count((panel, name)) > 1]
    if twice:
        raise BadInput(f"cell={twice[0]!r} stands twice in its panel: allowed is once")
    if any("seed" in cell.overrides for cell in cells):
        raise BadInput("a cell sets 'seed': allowed are seeds for all cells (--seeds)")


def sweep(
    cells: Sequence[Cell],
    seeds: Sequence[int],
    method: str = "fedmitr",
    profile: str = "laptop",
    overrides: Overrides | None = None,
    store: Path | str | None = None,
    out: Path | None = None,
) -> pd.DataFrame:
    """Run a method in every cell and return one row per cell and seed, written to the CSV `out` too.

    Settings that a cell leaves alone are those tuned for the method, where there are any. Finished runs come
    from the store.
    """
    if out:
        check_output(out, f"out={str(out)!r}")
    check_cells(cells)
    grid = [
        (cell, Settings.load(profile, {**(overrides or {}), **cell.overrides, "seed": seed}, method))
        for cell in cells
        for seed in seeds
    ]
    once = list(dict.fromkeys(settings for _, settings in grid))
    runs = compare([method], once, store)
    rows = {settings: row for settings, (_, row) in zip(once, runs.iterrows(), strict=True)}
    table = pd.DataFrame(
        [{"panel": cell.panel, "cell": cell.name, **rows[settings]} for cell, settings in grid]
    )
    if out:
        kept = [name for name in KEPT if name != "server_seconds"]  # times are not the same every time
        write_csv(table[kept], out, digits=6)
    return table[list(KEPT)]


def summarise_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return, for each panel and cell, its accuracy over seeds and the paired difference to the first cell.

    Columns: seeds, mean and std as in `summarise`; "minus first", the mean difference to the panel's first
    cell on the same seeds; "± 95 %", the half width of its interval (Student's t). The last two are NaN for
    the first cell itself, the last with one seed too.
    """
    rows = []
    for panel, runs in table.groupby("panel", sort=False):
        wide = runs.pivot(index="seed", columns="cell", values="accuracy")
        first = runs["cell"].iloc[0]
        for cell in dict.fromkeys(runs["cell"]):
            gap, half = paired(wide[cell], wide[first] if cell != first else float("nan"))
            row = {"panel": panel, "cell": cell, "seeds": len(wide), "mean": wide[cell].mean()}
            rows.append(row | {"std": wide[cell].std(), "minus first": gap, "± 95 %": half})
    return pd.DataFrame(rows).set_index(["panel", "cell"])
